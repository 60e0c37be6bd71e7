"""From what a pickle holds to flat mappings of names: state dicts, training checkpoints, whole modules."""

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
MAX_NESTED = 2
"""Dicts around the dict that holds the weights, beside the outermost."""
_OPTIMISER = re.compile(r"optim|scheduler|scaler|rng|random", re.IGNORECASE)
"""Keys beside the weights under which a training state is kept."""
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


def find_state_dicts(
    root: Any, members: Mapping[str, frozenset[str]] | None = None
) -> tuple[dict[str, dict[str, AnyTensor]], dict[str, Any]]:
    """Find the weights in an unpickled object.

    Args:
        members: of a TorchScript archive, see `script_members`.

    Returns:
        Tensors by name, by the key under which they were saved ("" where there is none), those that training scripts
        call the model's first; and the "class" of a module, what was "saved" beside the weights, and the key of an
        average "without_names".
    """
    if isinstance(root, Stub):
        tensors = _of_module(root, members)
        if not tensors:
            raise Malformed(f"it holds a {root.path[:200]!r} without tensors, not weights")
        return {"": tensors}, {"class": root.path}
    if not isinstance(root, dict):
        raise Malformed(f"it holds a {type(root).__name__}, not weights")
    nested = dict(_nested(root))
    direct = {_name("", name): value for name, value in root.items() if _is_tensor(value)}
    known = {key: nested.pop(key) for key in sorted(nested, key=_rank) if _rank(key) < len(WRAPPERS)}
    groups = known | ({"": direct} if direct else {}) | nested
    unnamed = next(_without_names(root), None)
    if not groups and unnamed:
        raise Malformed(f"{unnamed} holds an average without names, as torch_ema saves it")
    if not groups:
        if "param_groups" in root or any(isinstance(n, str) and n.startswith("optim") for n in root):
            raise Malformed("it holds an optimiser's state, not weights")
        raise Malformed("it holds a dict without tensors, not weights")
    first = next(iter(groups))
    owner = root.get(first.partition(".")[0])
    extra = {"class": owner.path} if isinstance(owner, Stub) else {}
    extra |= {"without_names": unnamed} if unnamed else {}
    return groups, extra | ({"saved": _plain(root)} if first else {})


def _rank(key: str) -> int:
    first = key.partition(".")[0]
    return WRAPPERS.index(first) if first in WRAPPERS else len(WRAPPERS)


def _nested(root: dict[Any, Any]) -> Iterator[tuple[str, dict[str, AnyTensor]]]:
    """Every module, and every dict that holds tensors by name, inside dicts; optimisers' states are not entered."""
    waiting, seen = [("", root, 0)], 0
    for prefix, inside, depth in waiting:
        for name, value in inside.items():
            if not isinstance(name, str) or _OPTIMISER.search(name):
                continue
            seen += 1 + (len(value) if isinstance(value, dict) else 0)
            if seen > MAX_TENSORS:
                raise Malformed(f"its dicts hold more than {MAX_TENSORS} entries")
            if _is_module(value):
                tensors = _of_module(value, None)
                seen += len(tensors)
                yield _name(prefix, name), tensors
            elif isinstance(value, dict):
                tensors = {_name("", n): v for n, v in value.items() if isinstance(n, str) and _is_tensor(v)}
                if tensors:
                    seen += len(tensors)
                    yield _name(prefix, name), tensors
                elif depth < MAX_NESTED:
                    waiting.append((_name(prefix, name), value, depth + 1))


def _without_names(root: dict[Any, Any]) -> Iterator[str]:
    """Yield the key of every list of averaged weights that has no names: torch_ema keeps `shadow_params` so."""
    for prefix, inside in (("", root), *((f"{k}.", v) for k, v in root.items() if isinstance(v, dict))):
        shadow = inside.get("shadow_params")
        if isinstance(shadow, list) and shadow and all(map(_is_tensor, shadow)):
            yield f"{str(prefix)[:200]}shadow_params"


def _of_module(root: Stub, members: Mapping[str, frozenset[str]] | None) -> dict[str, AnyTensor]:
    walk = _module_tensors(root, members)
    tensors = dict(islice(walk, MAX_TENSORS))
    if next(walk, None):
        raise Malformed(f"its modules hold more than {MAX_TENSORS} tensors")
    return tensors


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
