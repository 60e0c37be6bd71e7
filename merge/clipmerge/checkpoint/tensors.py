"""What a checkpoint is before anything is read: names, shapes, dtypes, and where the bytes lie."""

import os
from collections.abc import Iterator, Mapping
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
    """Return device, inode, size and time of modification: a file with the same stamp holds the same bytes."""
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


@dataclass(frozen=True, slots=True, eq=False)
class Extent:
    """Where a run of bytes lies: in a file, in memory (a flat uint8 array), or in a product of factors, as float32 in
    row-major order. Making one reads nothing.
    """

    source: "Path | Bytes | LowRank"
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

    @property
    def stored(self) -> Iterator[Extent]:
        """The extents that are stored: its own, or those of the factors that it is computed from."""
        for extent in self.extents:
            if isinstance(extent.source, LowRank):
                yield from extent.source.b.stored
                yield from extent.source.a.stored
            else:
                yield extent

    def view(self, raw: Bytes) -> npt.NDArray[Any]:
        """Return the bytes of all extents as an array of the tensor's shape (BF16 and F8 as raw bits); not a copy."""
        flat = raw.view(storage_dtype(self.dtype))
        if self.strides is None:
            return flat.reshape(self.shape)
        bytes_apart = tuple(step * flat.itemsize for step in self.strides)
        return np.lib.stride_tricks.as_strided(flat, self.shape, bytes_apart)


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """scale · B·A, the update of one weight by an adapter.

    Attributes:
        b, a: (rows, rank) and (rank, columns).
    """

    b: Tensor
    a: Tensor
    scale: float

    def tensor(self, shape: tuple[int, ...]) -> Tensor:
        """The product as a tensor of this shape, computed when it is read."""
        return Tensor("F32", shape, (Extent(self, 0, 4 * self.b.shape[0] * self.a.shape[1]),))


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
        factors: of an adapter, what its file holds, under the file's names, and its configuration's path; `tensors` are
            then the updates of weights.
    """

    name: str
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str] = field(default_factory=dict)
    layout: str = "open_clip"
    path: Path | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    stamps: Mapping[Path, Stamp] = field(default_factory=dict)
    factors: "Checkpoint | None" = None

    @property
    def is_sparse(self) -> bool:
        """Whether it is a task vector that is zero in all tensors that it lacks, as adapters are."""
        return self.factors is not None or "sparse" in self.extra

    def files(self) -> tuple[Path, ...]:
        """List every file that it was read from, sorted: those that hold its bytes, and the index that names them."""
        files = {e.source for t in self.tensors.values() for e in t.stored if isinstance(e.source, Path)}
        if self.path is not None:
            beside = (*self.path.glob("*.index.json"), *self.path.glob(".metadata"))
            files.update(beside if self.path.is_dir() else [self.path])
        if self.factors is not None:
            files.update(self.factors.files())  # and the configuration that scales them
        return tuple(sorted(files))

    def stamps_now(self) -> dict[Path, Stamp]:
        """Take the stamp of each of its files as they are now.

        Raises:
            CheckpointError: one of them has gone.
        """
        stamps = {}
        for file in self.files():
            try:
                stamps[file] = stamp(file.stat())
            except OSError as error:
                raise CheckpointError(
                    f"{file} cannot be read: {error.strerror}", hint="it was there when it was opened"
                ) from error
        return stamps


def identifiers(stems: list[str]) -> list[str]:
    """Make a distinct identifier for each file stem, in order: letters, digits and `_`, `_2` … on a clash."""
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
