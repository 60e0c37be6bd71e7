"""From what a pickle holds to one flat mapping of names: state dicts, training checkpoints, whole modules."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from clipmerge.checkpoint.pickle_reader import Malformed
from clipmerge.checkpoint.torch_calls import RawTensor, Unreadable
from clipmerge.checkpoint.unpickler import Stub

WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "module", "net", "params")
"""Keys under which training scripts keep the weights, in the order they are tried."""

MAX_MODULES, MAX_TENSORS, MAX_DEPTH, MAX_NAME = 100_000, 100_000, 64, 1024

AnyTensor = RawTensor | Unreadable
ScriptMembers = Callable[[str], frozenset[str] | None]


@dataclass
class Found:
    """Tensors by name; `extra` has the "class" of a module, and what was "saved" beside the weights."""

    tensors: dict[str, AnyTensor]
    extra: dict[str, Any] = field(default_factory=dict)


def find_state_dict(root: Any, members: ScriptMembers | None = None) -> Found:
    """The weights in an unpickled object. `members` knows a TorchScript class's parameters and buffers."""
    if isinstance(root, Stub):
        return _of_module(root, members)
    if not isinstance(root, dict):
        raise Malformed(f"it holds a {type(root).__name__}, not weights")
    for name in WRAPPERS:
        inner = root.get(name)
        if _is_module(inner) or (isinstance(inner, dict) and any(_is_tensor(v) for v in inner.values())):
            found = find_state_dict(inner)
            return Found(found.tensors, {**found.extra, "saved": _plain(root)})
    tensors = {name: value for name, value in root.items() if isinstance(name, str) and _is_tensor(value)}
    if not tensors:
        raise Malformed("it holds a dict without tensors, not weights")
    if longest := next((name for name in tensors if len(name) > MAX_NAME), None):
        raise Malformed(f"it has a tensor name of {len(longest)} characters")
    return Found(tensors)


def _of_module(root: Stub, members: ScriptMembers | None) -> Found:
    walk = _script_tensors(root, members) if members else _module_tensors(root)
    if not members and not _is_module(root):
        raise Malformed(f"it holds a {root.cls[:200]!r}, not weights")
    tensors = dict(islice(walk, MAX_TENSORS + 1))
    if len(tensors) > MAX_TENSORS:
        raise Malformed(f"its modules hold more than {MAX_TENSORS} tensors")
    if not tensors:
        raise Malformed(f"its {root.cls[:200]!r} holds no tensors")
    return Found(tensors, {"class": root.cls})


def _module_tensors(root: Stub) -> Iterator[tuple[str, AnyTensor]]:
    """What `state_dict()` of a pickled nn.Module gives: parameters, and buffers unless non-persistent."""
    for prefix, module in _modules(root, lambda stub: _entries(stub, "_modules")):
        hidden = module.state.get("_non_persistent_buffers_set") or ()
        for name, value in _entries(module, "_parameters").items():
            if _is_tensor(value):
                yield _joined(prefix, name), value
        for name, value in _entries(module, "_buffers").items():
            if _is_tensor(value) and name not in hidden:
                yield _joined(prefix, name), value


def _script_tensors(root: Stub, members: ScriptMembers) -> Iterator[tuple[str, AnyTensor]]:
    """A scripted module keeps all attributes in one dict; its class's code says which are its state."""
    for prefix, module in _modules(root, lambda stub: stub.state if isinstance(stub.state, dict) else {}):
        if not isinstance(module.state, dict):
            continue
        known = members(module.cls)
        for name, value in module.state.items():
            if _is_tensor(value) and (known is None or name in known):
                yield _joined(prefix, name), value


def _modules(root: Stub, children: Callable[[Stub], dict[Any, Any]]) -> Iterator[tuple[str, Stub]]:
    waiting, seen = [("", root, 0)], 0
    while waiting:
        prefix, module, depth = waiting.pop()
        seen += 1
        if seen > MAX_MODULES or depth > MAX_DEPTH:
            raise Malformed("its modules are nested without end")
        yield prefix, module
        for name, child in children(module).items():
            if isinstance(child, Stub) and (_is_module(child) or child.cls.startswith("__torch__.")):
                waiting.append((_joined(prefix, name), child, depth + 1))


def _is_module(value: Any) -> bool:
    return isinstance(value, Stub) and isinstance(value.state, dict) and "_parameters" in value.state


def _entries(module: Stub, kind: str) -> dict[Any, Any]:
    found = module.state.get(kind)
    return found if isinstance(found, dict) else {}


def _joined(prefix: str, name: Any) -> str:
    if not isinstance(name, str) or len(prefix) + len(name) > MAX_NAME:
        raise Malformed("it has a module whose name is not a text of reasonable length")
    return f"{prefix}.{name}" if prefix else name


def _is_tensor(value: Any) -> bool:
    return isinstance(value, RawTensor | Unreadable)


def _plain(root: dict[Any, Any]) -> dict[str, Any]:
    """Small plain values under text keys, as they were."""
    return {
        name: value
        for name, value in root.items()
        if isinstance(name, str)
        and isinstance(value, str | int | float | bool)
        and len(str(value)[:201]) <= 200
    }
