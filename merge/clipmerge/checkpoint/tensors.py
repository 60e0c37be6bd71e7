"""What a checkpoint is before anything is read: names, shapes, dtypes, and where the bytes lie."""

import hashlib
import mmap
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from keyword import iskeyword
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipmerge.dtypes import FLOATS, ITEMSIZE, storage_dtype
from clipmerge.errors import CheckpointError
from clipmerge.types import Bytes

Stamp = tuple[int, int, int, int]


def stamp(stat: os.stat_result) -> Stamp:
    """Device, inode, size and time of modification: a file with the same stamp holds the same bytes."""
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


@dataclass(frozen=True, slots=True, eq=False)
class Extent:
    """Where a run of bytes lies: in a file, or in memory (a flat uint8 array). Making one reads nothing."""

    source: Path | Bytes
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True, eq=False)
class Tensor:
    """A tensor on disk (or in memory): its extents, one after the other, are its elements in row-major order.

    Several extents are how q, k and v become one `in_proj_weight` without being read. `strides` (in elements,
    over the one extent) is set only where the stored order is not row-major: transposed projections, views.
    """

    dtype: str
    shape: tuple[int, ...]
    extents: tuple[Extent, ...]
    strides: tuple[int, ...] | None = None

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEMSIZE[self.dtype]

    @property
    def is_float(self) -> bool:
        return self.dtype in FLOATS


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Checkpoint:
    """Named tensors, not yet read. Equal only to itself; two objects over one file share their `stamp`.

    Attributes:
        name: how notation calls it (an identifier made from the file's name).
        tensors: open_clip's names, sorted → `Tensor`.
        metadata: the file's own key → text pairs (safetensors' `__metadata__`).
        layout: whose names the file used: "open_clip", "huggingface", "openai", "model-soups", "wise-ft" …
        path: the file or folder, None for tensors in memory.
        extra: what else the file carried and a reader understood (epoch, dropped names …).
        stamps: each file's `stamp` when it was opened; reading it later in another state is refused.
    """

    name: str
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    layout: str = "open_clip"
    path: Path | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    stamps: Mapping[Path, Stamp] = field(default_factory=dict)

    def files(self) -> tuple[Path, ...]:
        """Every file that it was read from, sorted: those that hold its bytes, and the index that names them."""
        found = {e.source for t in self.tensors.values() for e in t.extents if isinstance(e.source, Path)}
        if self.path is not None:
            found.update(self.path.glob("*.index.json") if self.path.is_dir() else [self.path])
        return tuple(sorted(found))

    def stamps_now(self) -> dict[Path, Stamp]:
        """The stamp of each of its files as they are now.

        Raises:
            CheckpointError: one of them has gone.
        """
        found = {}
        for file in self.files():
            try:
                found[file] = stamp(file.stat())
            except OSError as error:
                raise CheckpointError(
                    f"{file} cannot be read: {error.strerror}", hint="it was there when it was opened"
                ) from error
        return found

    def read(self, name: str) -> npt.NDArray[Any]:
        """One tensor as an array of its own (BF16 and F8 as raw bits)."""
        tensor = self.tensors[name]
        with Mapped() as mapped:
            return np.array(mapped.array(tensor), copy=True)


class Mapped:
    """Maps files on first use and keeps them mapped until closed; only the bytes that headers name are touched.

    A file that is shorter than a header promises is refused here, not met as SIGBUS in the middle of a merge.
    """

    def __init__(self) -> None:
        self._maps: dict[Path, Bytes] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "Mapped":
        return self

    def __exit__(self, *_: object) -> None:
        self._maps.clear()
        self._stack.close()

    def bytes_of(self, extent: Extent) -> Bytes:
        """The extent's bytes, shape (nbytes,), read-only, not copied."""
        whole = extent.source if isinstance(extent.source, np.ndarray) else self._map(extent.source)
        if extent.offset + extent.nbytes > whole.size:
            raise CheckpointError(
                f"{extent.source} ends at byte {whole.size}, its header promises {extent.offset + extent.nbytes}",
                hint="the file is truncated or was changed while it was read; copy it again",
            )
        return whole[extent.offset : extent.offset + extent.nbytes]

    def array(self, tensor: Tensor) -> npt.NDArray[Any]:
        """The tensor, read-only; copied only where it has several extents or strides."""
        dtype = storage_dtype(tensor.dtype)
        parts = [self.bytes_of(extent) for extent in tensor.extents]
        if not parts:
            return np.empty(tensor.shape, dtype)
        raw = parts[0] if len(parts) == 1 else np.concatenate(parts)
        flat = raw.view(dtype)
        if tensor.strides is not None:
            bytes_apart = tuple(step * dtype.itemsize for step in tensor.strides)
            return np.lib.stride_tricks.as_strided(flat, tensor.shape, bytes_apart, writeable=False)
        return flat.reshape(tensor.shape)

    def _map(self, path: Path) -> Bytes:
        if path not in self._maps:
            try:
                with path.open("rb") as file:
                    size = os.fstat(file.fileno()).st_size
                    mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
            except OSError as error:
                raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
            self._maps[path] = np.frombuffer(mapped, np.uint8)
        return self._maps[path]


def identifiers(stems: list[str]) -> list[str]:
    """A distinct identifier for each file stem, in order: letters, digits and `_`, `_2` … on a clash."""
    taken: set[str] = set()
    out = []
    for stem in stems:
        word = "".join(c if c.isascii() and c.isalnum() else "_" for c in stem).strip("_") or "weights"
        word = f"w_{word}" if word[0].isdigit() or iskeyword(word) else word
        name, count = word, 1
        while name in taken:
            count += 1
            name = f"{word}_{count}"
        taken.add(name)
        out.append(name)
    return out


def iter_blocks(numel: int, size: int) -> Iterator[tuple[int, int]]:
    """Half-open element ranges of at most `size` that cover `numel`."""
    for start in range(0, numel, size):
        yield start, min(start + size, numel)


def names_digest(tensors: Mapping[str, Tensor]) -> str:
    """A short digest of names, dtypes and shapes: equal for checkpoints that fit together."""
    text = "\n".join(f"{n} {t.dtype} {t.shape}" for n, t in sorted(tensors.items()))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
