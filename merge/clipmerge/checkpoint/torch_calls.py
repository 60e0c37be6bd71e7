"""What a checkpoint's pickle may call, by name: a table. Nothing here imports what it names.

The rule, in full:

- a name in `_CALLS` is done by the few lines beside it: tensors become descriptions, containers dicts;
- a name in `UNREADABLE` gives a marker, and the tensor that turns out to be one is refused by its name;
- a class outside the standard library, by the convention that classes have capitals (`InterpolationMode`), what
  belongs to a module of plain data (`_DATA_MODULES`) and the few names in `_INERT` become a `Stub`, as every instance
  that pickle makes without calling does;
- any other call is refused with the name that was asked for. Nothing would run in any case: the rule is there
  because a file that needs a function to be understood is not understood.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from clipmerge.checkpoint.tensors import Extent
from clipmerge.checkpoint.unpickler import Global, Malformed, Stub, Unsafe, dict_of, new
from clipmerge.dtypes import BY_TORCH_NAME, ITEMSIZE

STORAGES: Mapping[str, str] = {
    "DoubleStorage": "F64", "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8",
    "ByteStorage": "U8", "BoolStorage": "BOOL", "ComplexFloatStorage": "C64",
    "UntypedStorage": "U8", "_UntypedStorage": "U8",
}  # fmt: skip
_UNREAD_WIDTHS: Mapping[str, int] = {
    "ComplexDoubleStorage": 16, "QInt32Storage": 4, "QInt8Storage": 1, "QUInt8Storage": 1,
    "QUInt4x2Storage": 1, "QUInt2x4Storage": 1,
}  # fmt: skip
UNREADABLE: Mapping[str, str] = {
    "torch._utils._rebuild_sparse_tensor": "sparse",
    "torch._utils._rebuild_sparse_csr_tensor": "sparse",
    "torch._utils._rebuild_nested_tensor": "nested",
    "torch._utils._rebuild_qtensor": "quantized",
    "torch._utils._rebuild_meta_tensor_no_storage": "without data (device meta)",
    "torch._utils._rebuild_wrapper_subclass": "of a wrapper class",
    "torch._utils._rebuild_device_tensor_from_numpy": "of a device of its own",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": "of a device of its own",
    "torch.jit._pickle.build_tensor_from_id": "given by number",
}
_DATA_MODULES = frozenset(
    {"argparse", "collections", "datetime", "decimal", "numpy", "pathlib", "random", "types", "uuid"}
)
_INERT = frozenset(
    {f"builtins.{name}" for name in ("bytearray", "bytes", "complex", "object", "range", "slice")}
    | {"functools.partial", "torch.Generator", "torch.device", "torch.serialization._get_layout"}
)


@dataclass(slots=True, eq=False)
class Storage:
    """A storage that a pickle names: `nbytes` from `start` of the one with this key, or of `extent`.

    `dtype` is None for elements that we do not read; their `width` still says where the next storage begins.
    """

    key: str
    dtype: str | None
    width: int
    nbytes: int
    start: int = 0
    extent: Extent | None = None


@dataclass(frozen=True, slots=True, eq=False)
class RawTensor:
    """A tensor as the pickle describes it; nothing about it has been checked yet."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[Any, ...]
    strides: tuple[Any, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Unreadable:
    """A tensor of a kind that has no plain bytes."""

    kind: str


def call(nested: Callable[[Extent | bytes], Any], function: Global, args: tuple[Any, ...]) -> Any:
    """Return what calling `function` gives.

    Args:
        nested: reads a pickle inside a byte string.
    """
    path = function.path
    if path == "torch.storage._load_from_bytes":
        return nested(*args)
    if path in ("torch._tensor._rebuild_from_type_v2", "torch._tensor._rebuild_from_type"):
        inner, _, inner_args, _ = args
        if not isinstance(inner, Global) or not isinstance(inner_args, tuple):
            raise Malformed("it rebuilds a tensor by something that is not a function")
        if "_rebuild_from_type" in inner.path:  # or each would call the next, without end
            raise Unsafe(inner.path)
        return inner(*inner_args)
    if path in _CALLS:
        return _CALLS[path](*args)
    if path in UNREADABLE:
        return Unreadable(UNREADABLE[path])
    first, last = path.partition(".")[0], path.rpartition(".")[2]
    is_foreign_class = first not in sys.stdlib_module_names and last.lstrip("_")[:1].isupper()
    if path in _INERT or first in _DATA_MODULES or is_foreign_class:
        return Stub(path, args)
    raise Unsafe(path)


def persistent(saved: Any) -> Any:
    """Return the storage (or, in old files, the class) that a persistent id stands for."""
    kind, *rest = saved if isinstance(saved, tuple) else (None,)
    if kind == "module" and rest:
        return rest[0]
    if kind != "storage" or len(rest) not in (4, 5) or not isinstance(rest[0], Global | Stub):
        raise Malformed("it refers to something that is not a storage")
    cls, name, _, numel, *view = rest
    word = cls.path.rpartition(".")[2] if isinstance(cls, Global) else ""
    if not isinstance(name, str | int) or type(numel) is not int or numel < 0:
        raise Malformed("it has a storage without a size")
    dtype = STORAGES.get(word)
    if dtype is None and word not in _UNREAD_WIDTHS:
        raise Malformed(f"it has a storage of the unknown kind {word[:40]!r}")
    width = _UNREAD_WIDTHS[word] if dtype is None else ITEMSIZE[dtype]
    if not view or view[0] is None:
        return Storage(str(name), dtype, width, numel * width)
    _, offset, part = view[0]
    if type(offset) is not int or type(part) is not int or min(offset, part) < 0:
        raise Malformed("it has a malformed view of a storage")
    if offset + part > numel:
        raise Malformed("it has a view that is larger than its storage")
    return Storage(str(name), dtype, width, part * width, offset * width)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any) -> RawTensor | Unreadable:
    """`_rebuild_tensor` and `_v2`: requires_grad, hooks and metadata (conjugated, negated) may follow."""
    if len(rest) > 2 and isinstance(rest[2], dict) and rest[2]:
        return Unreadable("a lazy " + "/".join(str(word)[:20] for word in rest[2]))
    return _raw(storage, storage.dtype if isinstance(storage, Storage) else None, offset, shape, strides)


def _tensor_v3(
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> RawTensor | Unreadable:
    word = dtype.path.rpartition(".")[2] if isinstance(dtype, Global) else ""
    return _raw(storage, BY_TORCH_NAME.get(word), offset, shape, strides)


def _raw(storage: Any, dtype: str | None, offset: Any, shape: Any, strides: Any) -> RawTensor | Unreadable:
    if not isinstance(storage, Storage) or not isinstance(shape, tuple) or not isinstance(strides, tuple):
        raise Malformed("it rebuilds a tensor from something that is not a storage")
    if any(type(n) is not int or n < 0 for n in (offset, *shape, *strides)) or len(shape) != len(strides):
        raise Malformed("it has a tensor whose shape or strides are not counts")
    if dtype is None:
        return Unreadable("of a dtype that clipmerge does not read")
    return RawTensor(storage, dtype, offset, shape, strides)


def _first(value: Any, *_: Any) -> Any:
    return value


def _dict(*args: Any) -> dict[Any, Any]:
    source = args[-1] if args else ()
    return dict_of(source.items() if isinstance(source, dict) else source)


def _list(items: Any = ()) -> list[Any]:
    if not isinstance(items, list | tuple):
        raise Malformed("it makes a list of something else")
    return list(items)


def _encoded(text: Any, encoding: Any = "latin1") -> bytes:
    """Protocol 2 writes bytes as text."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise Malformed("it encodes something that is not bytes in disguise")
    return text.encode("latin-1")


def _attribute(owner: Any, name: Any) -> Global | Stub:
    """How Python 3.11 pickles an enum's member; calling the result is refused under its whole name."""
    if not isinstance(owner, Global | Stub) or not isinstance(name, str) or len(owner.path + name) > 2000:
        raise Malformed("it takes an attribute of something that is not a class")
    path = f"{owner.path}.{name}"
    return Global(path, owner.call) if isinstance(owner, Global) else Stub(path)


_CALLS: Mapping[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": _first,
    "torch._utils._rebuild_parameter_with_state": _first,
    "torch.Size": lambda items=(): tuple(_list(items)),
    "torch.jit._pickle.build_intlist": _first,
    "torch.jit._pickle.build_doublelist": _first,
    "torch.jit._pickle.build_boollist": _first,
    "torch.jit._pickle.build_tensorlist": _first,
    "torch.jit._pickle.restore_type_tag": _first,
    "collections.OrderedDict": _dict,
    "collections.Counter": _dict,
    "collections.defaultdict": lambda _factory=None, *items: _dict(*items),
    "builtins.dict": _dict,
    "builtins.list": _list,
    "builtins.tuple": lambda items=(): tuple(_list(items)),
    "builtins.set": _list,
    "builtins.frozenset": _list,
    "builtins.getattr": _attribute,
    "_codecs.encode": _encoded,
    "copyreg._reconstructor": lambda cls, *_: new(cls, ()),
    "copyreg.__newobj__": lambda cls, *args: new(cls, args),
    "copyreg.__newobj_ex__": lambda cls, *args: new(cls, args),
}
