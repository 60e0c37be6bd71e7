"""Safetensors files: where each tensor's bytes lie, before a byte of tensor is read; and the header of a new file.

The reference implementation checks a header against the file's size and the format's rules (no holes, no overlaps, no
bytes left over), so that later code can read what the header names without looking again. Two things it lets pass are
refused here: a key that stands twice, of which readers may take the one or the other, and fields that it does not know.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError, safe_open

from clipmerge.checkpoint.tensors import Extent, Tensor
from clipmerge.dtypes import ITEMSIZE
from clipmerge.errors import CheckpointError, OutputError

MAX_HEADER = 100_000_000
"""Bytes; the bound of the reference implementation."""
MAX_RANK = 32
MAX_BYTES = 2**63 - 1

_DAMAGED = "the file is damaged or was not downloaded whole; fetch or save it again"
_KNOWN = "dtypes that are read: " + ", ".join(ITEMSIZE)


def looks_like(head: bytes) -> bool:
    """Return whether a file's first bytes can only be a safetensors header: a plausible size, then `{`."""
    return len(head) >= 9 and int.from_bytes(head[:8], "little") <= MAX_HEADER and head[8:9] == b"{"


def read_header(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Read the metadata and the tensors of one file, in the order of their bytes.

    Raises:
        CheckpointError: the file cannot be read, or its header breaks a rule; names the file.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            file.seek(0)
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= min(MAX_HEADER, size - 8):
                _refuse(path, f"is not a safetensors file: {size} bytes, a header of {length} promised")
            text = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    header = parse_json(path, text)
    if not isinstance(header, dict):
        _refuse(path, "has a header that is not a JSON object")
    metadata = header.pop("__metadata__", None)
    for name, entry in header.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            _refuse(path, f"tensor {name!r} needs exactly dtype, shape and data_offsets")
        if not isinstance(entry["dtype"], str) or entry["dtype"] not in ITEMSIZE:
            what = f"tensor {name!r} has the dtype {entry['dtype']!r}, which clipmerge does not read"
            _refuse(path, what, hint=_KNOWN)
    try:
        with safe_open(path, "np"):
            pass
    except SafetensorError as error:
        if "not fully covered" in str(error):  # the library has checked all entries by then
            promised = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
            _refuse(path, f"holds {size} bytes, its header promises {promised}")
        _refuse(
            path,
            f"breaks a rule of the format: {str(error).removeprefix('Error while deserializing header: ')}",
        )
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    tensors = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        check_shape(path, name, entry["dtype"], entry["shape"])
        extent = Extent(path, 8 + length + begin, end - begin)
        tensors[name] = Tensor(entry["dtype"], tuple(entry["shape"]), (extent,))
    return metadata or {}, tensors


def read_json(path: Path, limit: int, *, strict: bool = False) -> Any:
    """Read a JSON document of at most `limit` bytes, by the rules of `parse_json`."""
    try:
        with path.open("rb") as file:
            text = file.read(limit + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if len(text) > limit:
        _refuse(path, f"is too large: more than {limit:,} bytes")
    return parse_json(path, text, strict=strict)


def parse_json(path: Path, text: bytes, *, strict: bool = False) -> Any:
    """Parse a JSON document without duplicate keys; every way to be malformed is a CheckpointError.

    Args:
        strict: NaN and infinity, which Python's reader takes, are malformed too.
    """
    try:
        return json.loads(
            text.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=refuse_constant if strict else None,
        )
    except RecursionError:
        _refuse(path, "has JSON nested too deeply")
    except ValueError as error:
        _refuse(path, f"has malformed JSON: {error}")


def refuse_constant(constant: str) -> NoReturn:
    """Refuse what Python's reader takes for a number, and JSON does not know: NaN and infinity."""
    raise ValueError(f"{constant} is not JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for key, value in pairs:
        if key in document:
            raise ValueError(f"the key {key!r} stands twice")
        document[key] = value
    return document


def check_shape(path: Path, name: str, dtype: str, shape: "tuple[int, ...] | list[int]") -> None:
    """Refuse shapes that no array can have, empty ones included (`[2**62, 2**62, 0]`)."""
    if len(shape) > MAX_RANK:
        _refuse(path, f"tensor {name!r} has {len(shape)} dimensions; at most {MAX_RANK} are read")
    extent = ITEMSIZE[dtype]
    for size in shape:
        extent *= size or 1
        if extent > MAX_BYTES:
            _refuse(path, f"tensor {name!r} is larger than memory can address")


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


def _refuse(path: Path, what: str, hint: str = _DAMAGED) -> NoReturn:
    joint = ": " if what.startswith("tensor ") else " "
    raise CheckpointError(f"{path}{joint}{what[:400]}", hint=hint)
