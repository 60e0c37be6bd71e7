"""How far apart two sets of weights are, tower by tower and block by block, streamed in float64."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from math import sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from clipmerge.checkpoint.read import Reader
from clipmerge.checkpoint.tensors import ITEMSIZE, Checkpoint, Tensor, iter_blocks, storage_dtype
from clipmerge.ops.cast import scratch_for, widen
from clipmerge.types import Progress
from clipmerge.weights.check import check, reference_of
from clipmerge.weights.run import evaluate_weights
from clipmerge.weights.summary import grouped
from clipmerge.weights.weights import Weights

F64 = npt.NDArray[np.float64]
PIECE = 1 << 18
"""Elements compared together."""


@dataclass(frozen=True, slots=True)
class Distance:
    """One part of the model; `tower` is None for all of it.

    Attributes:
        relative: ‖a - b‖ / ‖a‖; None where a is zero.
        largest: the largest |a - b| of one element.
        cosine: between the task vectors a - base and b - base; None without a base or where one is zero.
        vector_a, vector_b: ‖a - base‖ and ‖b - base‖; None without a base.
    """

    tower: str | None
    block: int | None
    tensors: int
    parameters: int
    relative: float | None
    largest: float
    cosine: float | None = None
    vector_a: float | None = None
    vector_b: float | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """See `compare`.

    Attributes:
        differing: names of the tensors in which an element differs, sorted.
    """

    a: str
    b: str
    base: str | None
    parts: tuple[Distance, ...]
    whole: Distance
    differing: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON-ready, all fields."""
        return asdict(self)


def compare(
    a: Weights, b: Weights, base: Weights | None = None, *, on_progress: Progress | None = None
) -> Comparison:
    """Relative distances of `b` from `a`, and with a base the cosines of their task vectors.

    Raises:
        MismatchError: names or shapes differ.
    """
    for other in (b, base):
        if other is not None and (difference := a - other).terms:
            check(Weights(difference.terms, a.base))
    names = [name for name in a.names if reference_of(a).tensors[name].is_float]
    parts, sums, differing, done = [], [], [], 0
    used = [c for w in (a, b, base) if w is not None for c in w.checkpoints]
    with Reader(used) as reader, np.errstate(all="ignore"):
        for (tower, block), members in grouped(names).items():
            part = _Sums()
            for name in members:
                before = part.unequal
                for pieces in _pieces([w for w in (a, b, base) if w is not None], name, reader):
                    part.add(*pieces)
                if part.unequal > before:
                    differing.append(name)
                done += 1
                if on_progress:
                    on_progress("comparing", done, len(names))
            parts.append(part.distance(tower, block, len(members)))
            sums.append(part)
        reader.unchanged()
    whole = _Sums()
    for part in sums:
        whole.join(part)
    total = whole.distance(None, None, len(names))
    shown = [repr(w) if w is not None else None for w in (a, b, base)]
    return Comparison(str(shown[0]), str(shown[1]), shown[2], tuple(parts), total, tuple(sorted(differing)))


class _Sums:
    """Running sums over the elements of one part."""

    def __init__(self) -> None:
        self.count = self.unequal = 0
        self.largest = 0.0
        self.sums = np.zeros(5)
        self.has_base = False

    def add(self, a: F64, b: F64, base: F64 | None = None) -> None:
        apart = a - b
        self.count += a.size
        self.unequal += int(np.count_nonzero(apart))
        self.largest = float(np.maximum(self.largest, np.abs(apart).max(initial=0.0)))  # NaN stays NaN
        self.sums[:2] += np.dot(a, a), np.dot(apart, apart)
        if base is not None:
            self.has_base = True
            mine, theirs = a - base, b - base
            self.sums[2:] += np.dot(mine, mine), np.dot(theirs, theirs), np.dot(mine, theirs)

    def join(self, other: "_Sums") -> None:
        self.count += other.count
        self.unequal += other.unequal
        self.largest = float(np.maximum(self.largest, other.largest))
        self.sums += other.sums
        self.has_base |= other.has_base

    def distance(self, tower: str | None, block: int | None, tensors: int) -> Distance:
        own, apart, mine, theirs, both = (float(s) for s in self.sums)
        relative = sqrt(apart / own) if own else None
        found = Distance(tower, block, tensors, self.count, relative, self.largest)
        if not self.has_base:
            return found
        cosine = both / sqrt(mine * theirs) if mine and theirs else None
        return Distance(
            tower, block, tensors, self.count, relative, self.largest, cosine, sqrt(mine), sqrt(theirs)
        )


def _pieces(operands: Sequence[Weights], name: str, reader: Reader) -> Iterator[list[F64]]:
    """The same stretch of one tensor from every operand, stretch by stretch."""
    sources = [
        _stored(weights, name) or evaluate_weights(weights, name, reader).reshape(-1) for weights in operands
    ]
    for start, stop in iter_blocks(reference_of(operands[0]).tensors[name].numel, PIECE):
        yield [
            _read(source, start, stop, reader) if isinstance(source, Tensor) else source[start:stop]
            for source in sources
        ]


def _stored(weights: Weights, name: str) -> Tensor | None:
    """The tensor on disk that the operand simply is, None where something must be computed."""
    leaf, coefficient = next(iter(weights.terms.items()))
    if len(weights.terms) > 1 or not isinstance(leaf, Checkpoint) or coefficient.at(name) != 1:
        return None
    return None if leaf.tensors[name].strides else leaf.tensors[name]


def _read(tensor: Tensor, start: int, stop: int, reader: Reader) -> F64:
    size = ITEMSIZE[tensor.dtype]
    raw = np.empty((stop - start) * size, np.uint8)
    reader.into(tensor, start * size, raw)
    wide = widen(raw.view(storage_dtype(tensor.dtype)), tensor.dtype, scratch_for(stop - start))
    return wide.astype(np.float64)
