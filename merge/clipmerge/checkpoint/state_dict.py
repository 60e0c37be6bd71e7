"""From what a pickle holds to one flat mapping of names: state dicts, training checkpoints, whole modules."""

import re
from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from clipmerge.checkpoint.torch_calls import RawTensor, Unreadable
from clipmerge.checkpoint.unpickler import Malformed, Stub
from clipmerge.checkpoint.zip_file import Archive

WRAPPERS = ("state_dict", "model_state_dict", "model_state", "model", "module", "net", "params")
"""Keys under which training scripts keep the weights, in the order they are tried."""
MAX_MODULES, MAX_TENSORS, MAX_DEPTH, MAX_NAME, MAX_CODE = 100_000, 100_000, 64, 1024, 8 << 20
_CLASS = re.compile(r"^class (\w{1,200})\(Module\):$", re.MULTILINE)
_STATE = re.compile(r"^  __(?:parameters|buffers)__ = \[([^\]\n]*)\]$", re.MULTILINE)

AnyTensor = RawTensor | Unreadable


def script_members(archive: Archive, folder: str) -> dict[str, frozenset[str]]:
    """Read which attributes of scripted classes are their state: the archive's code says so in two lists of names.

    The code is text to us. Plain tensor attributes (an attention mask) stand beside parameters in the archive's
    pickle and are no part of a state dict.

    Returns:
        Names of the parameters and buffers by class, `__torch__.module.Class`.
    """
    members = {}
    for entry in archive.entries:
        if entry.startswith(f"{folder}/code/") and entry.endswith(".py"):
            module = entry.removeprefix(f"{folder}/code/").removesuffix(".py").replace("/", ".")
            parts = _CLASS.split(archive.read(entry, MAX_CODE).decode())
            for name, body in zip(parts[1::2], parts[2::2], strict=True):
                lists = " ".join(_STATE.findall(body))
                members[f"{module}.{name}"] = frozenset(re.findall(r'"([^"\n]{1,200})"', lists))
    return members


def find_state_dict(
    root: Any, members: Mapping[str, frozenset[str]] | None = None
) -> tuple[dict[str, AnyTensor], dict[str, Any]]:
    """Find the weights in an unpickled object.

    Args:
        members: of a TorchScript archive, see `script_members`.

    Returns:
        Tensors by name; and the "class" of a module, and what was "saved" beside the weights.
    """
    if isinstance(root, Stub):
        walk = _module_tensors(root, members)
        tensors = dict(islice(walk, MAX_TENSORS))
        if next(walk, None):
            raise Malformed(f"its modules hold more than {MAX_TENSORS} tensors")
        if not tensors:
            raise Malformed(f"it holds a {root.path[:200]!r} without tensors, not weights")
        return tensors, {"class": root.path}
    if not isinstance(root, dict):
        raise Malformed(f"it holds a {type(root).__name__}, not weights")
    for name in WRAPPERS:
        inner = root.get(name)
        if _is_module(inner) or (isinstance(inner, dict) and any(_is_tensor(v) for v in inner.values())):
            tensors, extra = find_state_dict(inner)
            return tensors, {**extra, "saved": _plain(root)}
    tensors = {_name("", name): value for name, value in root.items() if _is_tensor(value)}
    if not tensors:
        raise Malformed("it holds a dict without tensors, not weights")
    return tensors, {}


def _module_tensors(
    root: Stub, members: Mapping[str, frozenset[str]] | None
) -> Iterator[tuple[str, AnyTensor]]:
    """What `state_dict()` of a module gives: its parameters, and its buffers unless they are non-persistent.

    A pickled nn.Module keeps them in dicts of their own. A scripted one keeps all attributes in one dict; its class's
    code says which are its state.
    """
    waiting, seen = [("", root, 0)], 0
    while waiting:
        prefix, module, depth = waiting.pop()
        seen += 1
        if seen > MAX_MODULES or depth > MAX_DEPTH:
            raise Malformed("its modules are nested without end")
        state = _dict(module.state)
        if members is None:
            children = _dict(state.get("_modules"))
            values = {**_dict(state.get("_parameters")), **_dict(state.get("_buffers"))}
            hidden = state.get("_non_persistent_buffers_set") or ()
            known = None if not hidden else values.keys() - hidden
        else:
            children, values, known = state, state, members.get(module.path)
        for name, value in values.items():
            if _is_tensor(value) and (known is None or name in known):
                yield _name(prefix, name), value
        for name, child in children.items():
            if isinstance(child, Stub) and (_is_module(child) or child.path.startswith("__torch__.")):
                waiting.append((_name(prefix, name), child, depth + 1))


def _is_module(value: Any) -> bool:
    return isinstance(value, Stub) and "_parameters" in _dict(value.state)


def _dict(value: Any) -> dict[Any, Any]:
    return value if isinstance(value, dict) else {}


def _name(prefix: str, name: Any) -> str:
    if not isinstance(name, str) or len(prefix) + len(name) > MAX_NAME:
        raise Malformed("it has a tensor or module whose name is not a text of reasonable length")
    return f"{prefix}.{name}" if prefix else name


def _is_tensor(value: Any) -> bool:
    return isinstance(value, RawTensor | Unreadable)


def _plain(root: dict[Any, Any]) -> dict[str, Any]:
    """Small plain values under text keys, as they were."""

    def is_small(value: Any) -> bool:
        if isinstance(value, str):
            return len(value) <= 200
        return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**63)

    return {name: value for name, value in root.items() if isinstance(name, str) and is_small(value)}
