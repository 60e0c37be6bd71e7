"""Safetensors headers, read strictly: where each tensor's bytes lie, before a byte of tensor is read.

Everything in a header is checked against the file's size and against the format's own rules (no duplicate
keys, no holes, no overlaps), so that later code can map what the header names without looking again.
"""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NoReturn

from clipmerge.checkpoint.tensors import Extent, Tensor
from clipmerge.dtypes import ITEMSIZE
from clipmerge.errors import CheckpointError, OutputError

MAX_HEADER = 100_000_000
"""Bytes; the bound of the reference implementation."""
MAX_RANK = 32
MAX_BYTES = 2**63 - 1

_DAMAGED = "the file is damaged or was not downloaded whole; fetch or save it again"


def looks_like(head: bytes) -> bool:
    """True where a file's first bytes can only be a safetensors header: a plausible size, then `{`."""
    return len(head) >= 9 and int.from_bytes(head[:8], "little") <= MAX_HEADER and head[8:9] == b"{"


def read_header(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The metadata and the tensors of one file, in the order of their bytes.

    Raises:
        CheckpointError: the file cannot be read, or its header breaks a rule; names the file and the tensor.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
                _broken(path, f"is not a safetensors file: {size} bytes, a header of {length} promised")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if len(text) != length:
        _broken(path, "was shortened while it was read")
    header = _parse(path, text)
    metadata = _metadata(path, header.pop("__metadata__", None))
    return metadata, _tensors(path, header, start=8 + length, end=size)


def parse_json(path: Path, text: bytes) -> Any:
    """A JSON document without duplicate keys; every way to be malformed is a CheckpointError."""
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        _broken(path, "has JSON nested too deeply")
    except ValueError as error:
        _broken(path, f"has a malformed JSON header: {error}")


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    if not text.startswith(b"{"):
        _broken(path, "has a header that is not a JSON object")
    header: dict[str, Any] = parse_json(path, text)
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice!r} stands twice")
    return found


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")


def _metadata(path: Path, found: Any) -> dict[str, str]:
    if found is None:
        return {}
    if not isinstance(found, dict):
        _broken(path, "has a __metadata__ that is not an object")
    for key, value in found.items():
        if not isinstance(value, str) or not _is_text(key) or not _is_text(value):
            _broken(path, f"has a __metadata__ entry {key!r} that is not text")
    return found


def _tensors(path: Path, header: Mapping[str, Any], start: int, end: int) -> dict[str, Tensor]:
    found = [(*_entry(path, name, entry), name) for name, entry in header.items()]
    found.sort(key=lambda item: item[:2])
    tensors, at = {}, 0
    for begin, stop, dtype, shape, name in found:
        if begin != at:
            wrong = "overlaps the one before" if begin < at else f"leaves a hole of {begin - at} bytes"
            _broken(path, f"tensor {name!r} {wrong}")
        if start + stop > end:
            _broken(path, f"tensor {name!r} ends at byte {start + stop} of {end}")
        tensors[name] = Tensor(dtype, shape, (Extent(path, start + begin, stop - begin),))
        at = stop
    if start + at != end:
        _broken(path, f"has {end - start - at} bytes after its last tensor")
    return tensors


def _entry(path: Path, name: str, entry: Any) -> tuple[int, int, str, tuple[int, ...]]:
    if not _is_text(name):
        _broken(path, f"has a tensor name {name!r} that is not Unicode")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        _broken(path, f"tensor {name!r} needs exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ITEMSIZE:
        _broken(path, f"tensor {name!r} has the dtype {dtype!r}, which clipmerge does not read", hint=_KNOWN)
    if not _counts(shape):
        _broken(path, f"tensor {name!r} has a malformed shape")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        _broken(path, f"tensor {name!r} has malformed data_offsets")
    check_shape(path, name, dtype, shape)
    needs = prod(shape) * ITEMSIZE[dtype]
    if offsets[1] - offsets[0] != needs:
        _broken(path, f"tensor {name!r} holds {offsets[1] - offsets[0]} bytes, {dtype} {shape} needs {needs}")
    return offsets[0], offsets[1], dtype, tuple(shape)


def header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, dict[str, int], int]:
    """Return the header of a file of these tensors, each tensor's offset in it, and the file's size.

    Widest elements first, then by name: every tensor is aligned, and the order is a function of the content.

    Raises:
        OutputError: a name holds half a surrogate pair, which no file of this format can hold.
    """
    order = sorted(tensors, key=lambda name: (-ITEMSIZE[tensors[name].dtype], name))
    entries: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    at, begins = 0, {}
    for name in order:
        tensor = tensors[name]
        begins[name] = at
        at += tensor.nbytes
        entries[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begins[name], at],
        }
    try:
        text = json.dumps(entries, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise OutputError(
            f"a name or text is not Unicode and cannot be stored: {error.object[error.start - 20 : error.end]!r}",
            hint="rename that tensor, or take that text out of the metadata",
        ) from None
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    offsets = {name: start + begin for name, begin in begins.items()}
    return len(text).to_bytes(8, "little") + text, offsets, start + at


def check_shape(path: Path, name: str, dtype: str, shape: "tuple[int, ...] | list[int]") -> None:
    """Refuse shapes that no array can have, empty ones included (`[2**62, 2**62, 0]`)."""
    if len(shape) > MAX_RANK:
        _broken(path, f"tensor {name!r} has {len(shape)} dimensions; at most {MAX_RANK} are read")
    extent = ITEMSIZE[dtype]
    for size in shape:
        extent *= size or 1
        if extent > MAX_BYTES:
            _broken(path, f"tensor {name!r} is larger than memory can address")


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(v) is int and v >= 0 for v in values)


def _is_text(word: str) -> bool:
    return word.isascii() or not any("\ud800" <= c <= "\udfff" for c in word)


_KNOWN = "dtypes that are read: " + ", ".join(ITEMSIZE)


def _broken(path: Path, what: str, hint: str = _DAMAGED) -> NoReturn:
    joint = ": " if what.startswith("tensor ") else " "
    raise CheckpointError(f"{path}{joint}{what[:400]}", hint=hint)
