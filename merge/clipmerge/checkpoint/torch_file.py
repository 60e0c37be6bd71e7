"""Files that `torch.save`, `torch.jit.save` and `pickle.dump` wrote, read without torch, running nothing.

Three containers: a zip archive (torch 1.6 and later; TorchScript), the sequence of pickles and raw storages
that came before it, and a bare pickle, whose tensors are such sequences inside byte strings. In each, the
pickle is read by `unpickler`, and tensors become extents of the file: nothing of a tensor is read.
"""

import io
import pickle
import struct
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from clipmerge.checkpoint import zip_file
from clipmerge.checkpoint.safetensors import check_shape
from clipmerge.checkpoint.state_dict import AnyTensor, find_state_dicts, script_members
from clipmerge.checkpoint.tensors import Extent, Tensor
from clipmerge.checkpoint.torch_calls import RawTensor, Storage, Unreadable, call, persistent
from clipmerge.checkpoint.unpickler import Budget, Malformed, Unpickler, Unsafe, Window
from clipmerge.checkpoint.views import row_major
from clipmerge.dtypes import ITEMSIZE
from clipmerge.errors import CheckpointError, UnsafeFileError

MAX_PICKLE = 256 << 20
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_FAULTS = (
    IndexError, KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, EOFError,
    pickle.UnpicklingError, struct.error,
)  # fmt: skip
"""What Python's unpickler meets in a damaged file."""

Locate = Callable[[str], Extent]
"""Storage key → where the storage lies."""


def looks_like(head: bytes) -> bool:
    """Return whether it may be a zip archive, a pickle of protocol 2 or later, or one of protocol 0."""
    return zip_file.looks_like(head) or head[:1] == b"\x80" or head[:1] in (b"c", b"(", b"}", b"]")


def read_torch(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Read the tensors of a file by the names its state dicts give them, and the plain values beside them.

    Returns:
        Each state dict by its key, the main one first (see `find_state_dicts`); and what was saved beside it.

    Raises:
        UnsafeFileError: the pickle calls something that is not on the list; names it.
        CheckpointError: the file is damaged, or holds no tensors, or a tensor without plain bytes.
    """
    with explained(path), path.open("rb") as file:
        groups, extra, locate = _read(path, file)
        read: dict[str, dict[str, Tensor]] = {}
        for key, tensors in groups.items():
            try:
                read[key] = {name: _tensor(path, name, raw, locate) for name, raw in tensors.items()}
            except (CheckpointError, Malformed):
                if not read:  # of what stands beside the weights, only what can be read is offered
                    raise
        return read, extra


def read_pickle(path: Path) -> Any:
    """Read a bare pickle of plain data: dicts, lists, texts, numbers, and inert instances. To be `explained`."""
    with path.open("rb") as file:
        end = file.seek(0, 2)
        if end > MAX_PICKLE:
            raise Malformed(f"its pickle has {end} bytes; at most {MAX_PICKLE} are read")
        return _read_pickles(Window(file, path, 0, end, Budget(end)))[0]


def read_saved_tensor(path: Path, name: str, start: int, length: int) -> Tensor:
    """Read the one tensor that `torch.save` wrote into a part of a file. To be `explained`."""
    with path.open("rb") as file:
        part = zip_file.Part(file, start, length)
        if not zip_file.looks_like(part.read(8)):
            raise Malformed(f"what it keeps of {_shown(name)!r} is not what torch saves")
        root, locate, _ = _read_archive(zip_file.Archive(path, part, start))
        if not isinstance(root, RawTensor | Unreadable):
            raise Malformed(f"what it keeps of {_shown(name)!r} is not a tensor")
        return _tensor(path, name, root, locate)


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn what goes wrong while a pickle is read into an error that names the file.

    Raises:
        UnsafeFileError, CheckpointError: see `read_torch`.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except Unsafe as error:
        raise UnsafeFileError(
            f"{path} needs code that clipmerge does not run: it calls {_shown(str(error))}",
            hint="if you trust the file, load it with its own code and save its state_dict() alone",
        ) from None
    except Malformed as error:
        raise CheckpointError(f"{path} cannot be read: {error}", hint=_HINT) from None
    except _FAULTS as error:
        raise CheckpointError(
            f"{path} cannot be read: its pickle is damaged ({type(error).__name__})", hint=_HINT
        ) from error


def _read(path: Path, file: BinaryIO) -> tuple[dict[str, dict[str, AnyTensor]], dict[str, Any], Locate]:
    if not zip_file.looks_like(file.read(8)):
        end = file.seek(0, 2)
        root, locate = _read_pickles(Window(file, path, 0, end, Budget(end)))
        return *find_state_dicts(root), locate
    root, locate, members = _read_archive(zip_file.Archive(path, file))
    return *find_state_dicts(root, members), locate


def _read_archive(archive: zip_file.Archive) -> tuple[Any, Locate, Mapping[str, frozenset[str]] | None]:
    """What a zip archive of torch's holds, where its storages lie, and of TorchScript what is state."""
    roots = [name for name in archive.entries if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(roots) != 1:
        raise Malformed("it is a zip archive, but not one that torch wrote")
    folder = roots[0].partition("/")[0]
    order = f"{folder}/byteorder"
    if order in archive.entries and archive.read(order, 16).strip() != b"little":
        raise Malformed("it was saved on a big-endian machine; save it again on a little-endian one")
    data = archive.read(roots[0], MAX_PICKLE)
    root, _ = _read_pickles(_in_memory(data, Budget(len(data))), nesting=1)
    is_script = any(name.startswith(f"{folder}/code/") for name in archive.entries)
    members = script_members(archive, folder) if is_script else None
    return root, cache(lambda key: archive.locate(f"{folder}/data/{key}")), members


def _read_pickles(window: Window, nesting: int = 0) -> tuple[Any, Locate]:
    """One pickle, or the legacy sequence: magic, version, machine, object, storage keys, storages."""
    storages: dict[str, Storage] = {}
    places: dict[str, Extent] = {}

    def nested(data: Extent | bytes) -> Any:
        if nesting > 1:
            raise Malformed("it nests files too deeply")
        if isinstance(data, Extent):
            end = data.offset + data.nbytes
            part = Window(window.file, window.source, data.offset, end, window.budget)
        else:
            part = _in_memory(data, window.budget)
        root, locate = _read_pickles(part, nesting + 1)
        window.file.seek(window.at)
        if isinstance(root, Storage):
            root.extent = root.extent or locate(root.key)
        return root

    def named(saved: Any) -> Any:
        storage = persistent(saved)
        if isinstance(storage, Storage):
            storages.setdefault(storage.key, storage)
        return storage

    def load() -> Any:
        return Unpickler(window, partial(call, nested), named).load()

    def locate(key: str) -> Extent:
        if key not in places:
            raise Malformed("it has a tensor whose storage is not in the file")
        return places[key]

    root = load()
    if root != LEGACY_MAGIC or isinstance(root, bool):
        return root, locate
    version, machine = load(), load()
    if version != 1001 or not isinstance(machine, dict) or machine.get("little_endian") is not True:
        raise Malformed("it was saved by a torch, or on a machine, whose files are not read")
    storages.clear()
    root, keys = load(), load()
    if not isinstance(keys, list):
        raise Malformed("its list of storages is not a list")
    for key in keys:  # behind the pickles: for each key a count of elements (8 bytes), then the elements
        storage = storages.get(str(key)) if isinstance(key, str | int) else None
        if storage is None or storage.key in places:
            raise Malformed("its list of storages does not match its tensors")
        places[storage.key] = window.skip(int.from_bytes(window.read(8), "little") * storage.width)
    return root, locate


def _in_memory(data: bytes, budget: Budget) -> Window:
    return Window(io.BytesIO(data), np.frombuffer(data, np.uint8), 0, len(data), budget)


def _tensor(path: Path, name: str, raw: RawTensor | Unreadable, locate: Locate) -> Tensor:
    """The raw tensor as an extent, once its storage is known to hold it."""
    if isinstance(raw, Unreadable):
        raise CheckpointError(
            f"{path}: tensor {_shown(name)!r} is {raw.kind}",
            hint="make it a dense tensor (`.to_dense()`, `.dequantize()`, `.float()`) and save it again",
        )
    width, whole = ITEMSIZE[raw.dtype], raw.storage.extent or locate(raw.storage.key)
    if raw.storage.start + raw.storage.nbytes > whole.nbytes:
        raise Malformed(f"the storage of tensor {_shown(name)!r} is larger than the bytes that are there")
    check_shape(path, name, raw.dtype, raw.shape)
    numel, reach = prod(raw.shape), 0
    if numel:  # an empty view may start anywhere: torch writes offsets behind the storage's end
        reach = 1 + sum((size - 1) * step for size, step in zip(raw.shape, raw.strides, strict=True))
        if (raw.offset + reach) * width > raw.storage.nbytes:
            raise Malformed(f"tensor {_shown(name)!r} of shape {raw.shape} reaches beyond its storage")
        if numel * width > raw.storage.nbytes:  # a small file could ask for any amount of memory
            raise CheckpointError(
                f"{path}: tensor {_shown(name)!r} of shape {raw.shape} is expanded from fewer numbers",
                hint="make it a tensor of its own (`.contiguous()`) and save it again",
            )
    begin = whole.offset + raw.storage.start + (raw.offset * width if numel else 0)
    strides = None if row_major(raw.shape, raw.strides) else raw.strides
    return Tensor(raw.dtype, raw.shape, (Extent(whole.source, begin, reach * width),), strides)


def _shown(name: str) -> str:
    """A name from a file, fit for a terminal."""
    return repr(name[:200])[1:-1]


_HINT = "the file is damaged, or not a checkpoint; save it again as .safetensors"
