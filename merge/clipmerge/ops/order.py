"""Order statistics of magnitudes: exact, also over more numbers than are in memory."""

from collections.abc import Callable, Sequence
from fractions import Fraction
from math import ceil, sqrt
from typing import TypeAlias

import numpy as np

from clipmerge.types import Reals

Share: TypeAlias = float
"""Of a whole, between 0 and 1; counts as the decimal that it prints as."""

Blocks: TypeAlias = Callable[[Callable[[Sequence[Reals]], list[Reals]], bool], list[list[Reals]]]
"""`blocks(function, sampled)`: calls the function with a stretch of every vector, for all stretches or a sample of
each, and lists what it returns."""

_SIGMAS = 12
"""Half a bracket's width in standard errors of a sample of single numbers; neighbours in a tensor are alike."""

_WIDEST = 1e12


def count_of(size: int, share: Share) -> int:
    """Return how many of `size` numbers a share is: rounded down, at least one where there are any."""
    return min(size, max(1, int(Fraction(repr(float(share))) * size)))


def kth_largest(numbers: Reals, count: int) -> float:
    """Return the `count`-th largest magnitude of an array; 0 of an empty one.

    Args:
        count: 1 is the largest.
    """
    magnitudes = np.abs(numbers).reshape(-1)
    if magnitudes.size == 0:
        return 0.0
    place = magnitudes.size - count
    return float(np.partition(magnitudes, place)[place])


def kth_largest_of_stream(blocks: Blocks, ranks: Sequence[Sequence[int]], size: int) -> list[list[float]]:
    """Find order statistics of vectors that are read in stretches: from a sample, then exactly in one pass.

    A sample brackets each rank; the pass counts what lies above the bracket and keeps what lies inside, in which the
    rank is then exact. A bracket that misses its rank is widened and the pass repeated.

    Args:
        ranks: of each vector, which largest magnitudes are wanted: 1 is the largest.
        size: the length of each vector.
    """
    sample = [np.concatenate(parts) for parts in zip(*blocks(_magnitudes, True), strict=True)]
    found: dict[tuple[int, int], float] = {}
    width = float(_SIGMAS)
    wanted = [(i, rank) for i, of_vector in enumerate(ranks) for rank in of_vector]
    while missing := [key for key in wanted if key not in found]:
        brackets = {key: _bracket(sample[key[0]], key[1], size, width) for key in missing}
        parts = blocks(lambda vectors: _inside(vectors, brackets), False)  # noqa: B023 - called at once
        for column, (i, rank) in enumerate(brackets):
            inside = np.concatenate([part[2 * column] for part in parts])
            above = int(sum(part[2 * column + 1][0] for part in parts))
            if above < rank <= above + inside.size:
                found[i, rank] = kth_largest(inside, rank - above)
        width *= 8
        if width > _WIDEST:  # every number is inside by now, but NaN, which has no rank
            return [[found.get((i, rank), 0.0) for rank in of_vector] for i, of_vector in enumerate(ranks)]
    return [[found[i, rank] for rank in of_vector] for i, of_vector in enumerate(ranks)]


def _magnitudes(vectors: Sequence[Reals]) -> list[Reals]:
    return [np.abs(vector) for vector in vectors]


def _bracket(sample: Reals, rank: int, size: int, width: float) -> tuple[float, float]:
    """Return magnitudes between which the rank lies, very probably."""
    share = rank / size
    place = sample.size * (1 - share)
    margin = width * sqrt(sample.size * share * (1 - share)) + width
    low, high = int(max(place - margin, -1)), ceil(min(place + margin, sample.size))
    ends = [place for place in (low, high) if 0 <= place < sample.size]
    ordered = np.partition(sample, ends) if ends else sample
    return (
        float(ordered[low]) if low in ends else 0.0,
        float(ordered[high]) if high in ends else float("inf"),
    )


def _inside(vectors: Sequence[Reals], brackets: dict[tuple[int, int], tuple[float, float]]) -> list[Reals]:
    """For each bracket: the magnitudes inside it, and (as one number) how many lie above."""
    parts: list[Reals] = []
    magnitudes, above, inside = np.empty_like(vectors[0]), *np.empty((2, vectors[0].size), bool)
    held = None
    for (i, _), (low, high) in brackets.items():
        if i != held:  # brackets of one vector follow each other
            np.abs(vectors[i], out=magnitudes)
            held = i
        np.greater(magnitudes, magnitudes.dtype.type(high), out=above)
        np.greater_equal(magnitudes, magnitudes.dtype.type(low), out=inside)
        inside ^= above
        parts += [magnitudes[inside], np.array([np.count_nonzero(above)], np.float64)]
    return parts
