"""Reading one tensor, or a stretch of one, of any checkpoint: into memory that is used again, or to a GPU."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from clipmerge.checkpoint.read import Reader
from clipmerge.checkpoint.tensors import Checkpoint
from clipmerge.dtypes import ITEMSIZE, Scratch, storage_dtype, widen
from clipmerge.types import Array, Bytes, Reals
from clipmerge.weights.expression import Leaf, checkpoints_of

if TYPE_CHECKING:
    import torch

Uses: TypeAlias = Mapping[Checkpoint, int]
"""Checkpoint → how often it is read."""

Seen: TypeAlias = Callable[[Checkpoint, npt.NDArray[Any]], None]
"""Called with what was read of a checkpoint, as stored."""


class Pool:
    """Arrays that are used again once it is cleared: first touch of fresh memory is slower than arithmetic."""

    def __init__(self) -> None:
        self._arrays: list[Bytes] = []
        self._taken = 0

    def take(self, numel: int, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return an array (numel,) that holds anything."""
        size = numel * np.dtype(dtype).itemsize
        if self._taken == len(self._arrays):
            self._arrays.append(np.empty(size, np.uint8))
        elif self._arrays[self._taken].size < size:
            self._arrays[self._taken] = np.empty(size, np.uint8)
        self._taken += 1
        return self._arrays[self._taken - 1][:size].view(dtype)

    def clear(self) -> None:
        """Let what was taken be taken again."""
        self._taken = 0


class Read:
    """Reads one tensor, or a stretch of one, of any checkpoint: float32 where it is stored in so many bits or fewer."""

    def __call__(self, checkpoint: Checkpoint) -> Array:
        raise NotImplementedError

    def difference(self, one: Checkpoint, other: Checkpoint) -> Reals:
        """Subtract in float32."""
        return np.asarray(self(one) - self(other))


class ReadWhole(Read):
    """Reads a tensor; a checkpoint that is used again (a base) is read once and kept.

    Args:
        uses: how often each checkpoint will be read.
        seen: called with what was read, as stored.
    """

    def __init__(self, reader: Reader, name: str, uses: Uses, seen: Seen | None = None) -> None:
        self._reader, self._name, self._uses, self._seen = reader, name, uses, seen
        self._held: dict[Checkpoint, Reals] = {}

    def __call__(self, checkpoint: Checkpoint) -> Array:
        if checkpoint in self._held:
            return self._held[checkpoint]
        tensor = checkpoint.tensors[self._name]
        raw = self._reader.dense(tensor)
        if self._seen is not None:
            self._seen(checkpoint, raw)
        flat = raw.reshape(-1)
        numbers = widen(flat, tensor.dtype, Scratch(flat.size)) if flat.size else np.zeros(0, np.float32)
        if self._uses[checkpoint] > 1:
            self._held[checkpoint] = numbers.reshape(tensor.shape)
        return numbers.reshape(tensor.shape)


class ReadStretch(Read):
    """Reads the elements [low, high) of a row-major tensor, each once.

    Args:
        uses: how often each checkpoint will be read.
        scratch: for so many elements.
        pool: where what is read lies, until the next stretch is.
        seen: called with what was read, as stored.
    """

    def __init__(
        self,
        reader: Reader,
        name: str,
        low: int,
        high: int,
        uses: Uses,
        scratch: Scratch,
        pool: Pool,
        seen: Seen | None = None,
    ) -> None:
        self._reader, self._name, self._low, self._high = reader, name, low, high
        self._uses, self._scratch, self._pool, self._seen = uses, scratch, pool, seen
        self._held: dict[Checkpoint, Reals] = {}
        pool.clear()

    def __call__(self, checkpoint: Checkpoint) -> Array:
        if checkpoint not in self._held:
            tensor = checkpoint.tensors[self._name]
            raw = self._pool.take(self._high - self._low, storage_dtype(tensor.dtype))
            self._reader.into(tensor, self._low * ITEMSIZE[tensor.dtype], raw.view(np.uint8))
            if self._seen is not None:
                self._seen(checkpoint, raw)
            numbers = widen(raw, tensor.dtype, self._scratch)
            if numbers is not raw:
                np.copyto(held := self._pool.take(numbers.size, numbers.dtype), numbers)
                numbers = held
            self._held[checkpoint] = numbers
        return self._held[checkpoint]

    def difference(self, one: Checkpoint, other: Checkpoint) -> Reals:
        """Subtract in float32, where the first one lies if nothing else needs it."""
        first, second = self(one), self(other)
        out = self._held.pop(one) if self._uses[one] == 1 else self._pool.take(first.size, first.dtype)
        np.subtract(first, second, out=out)
        return out


class ReadLent(Read):
    """Reads what another reads, each once, to a GPU."""

    def __init__(self, read: Read, gpu: "torch.device") -> None:
        self._read, self._gpu = read, gpu
        self._held: dict[Checkpoint, Array] = {}

    def __call__(self, checkpoint: Checkpoint) -> Array:
        if checkpoint not in self._held:
            self._held[checkpoint] = lend(self._read(checkpoint), self._gpu)
        return self._held[checkpoint]


def uses_in(leaves: Iterable[Leaf]) -> Uses:
    """Count how often leaves, and methods' operands in them, name each checkpoint."""
    return Counter(checkpoint for leaf in leaves for checkpoint in checkpoints_of(leaf))


def lend(array: Array, gpu: "torch.device | None") -> Array:
    """Return an array where it is to be computed with."""
    if gpu is None or is_lent(array):
        return array
    import torch

    return torch.from_numpy(np.asarray(array)).to(gpu)


def back(array: Array) -> Reals:
    """Return an array as one of numpy."""
    return array.cpu().numpy() if is_lent(array) else np.asarray(array)


def is_lent(array: Array) -> bool:
    return not isinstance(array, np.ndarray | np.generic)
