"""Rules that take task vectors and give a task vector, one matrix (out, in) at a time, in float64.

Matrices are arrays of numpy, or of torch on a GPU: the rules are written in what both have, Python's array API.

Directions whose singular value is rounding (below `CUT` of the largest) are left out: an update of rank 2 has two
directions, and what an SVD returns beside them would be invented.
"""

from itertools import pairwise
from typing import Literal

from array_api_compat import array_namespace

from clipmerge.ops.decompose import (
    CUT,
    Triplets,
    above_the_cut,
    divided,
    polar,
    polar_and_values,
    polar_in_two,
    solved,
    triplets,
)
from clipmerge.types import Array

_EQUAL = 1e-7
"""Singular values within this share of the largest are one: those of a polar factor stay below."""


def tsv(*vectors: Array) -> Array:
    """Keep each task's first 1/T of singular triplets, make them orthogonal across tasks, and add them (TSV-M).

    Source: Gargiulo et al. 2025, arXiv 2412.00081.
    """
    if len(vectors) == 1:
        return vectors[0]
    xp = array_namespace(*vectors)
    count = max(1, min(vectors[0].shape) // len(vectors))
    parts = [triplets(vector, count) for vector in vectors]
    floor = CUT * max((part.values[0] for part in parts if part.values.size), default=0.0)
    parts = [_above(part, floor) for part in parts]
    left, after, _ = polar_in_two(xp.concat([part.left for part in parts], axis=1))
    right, before, _ = polar_in_two(xp.concat([part.right for part in parts], axis=1))
    between = (after * xp.concat([part.values for part in parts])) @ before.T
    return left @ (between @ right.T) if len(left) >= len(right) else (left @ between) @ right.T


def iso_c(*vectors: Array) -> Array:
    """Give the sum of task vectors one and the same singular value, the mean of its own (Iso-C).

    Source: Marczak et al. 2025, arXiv 2502.04959.
    """
    factor, values = polar_and_values(sum(vectors))
    return values.sum() / max(min(factor.shape), 1) * factor


def iso_cts(*vectors: Array, common: float) -> Array:
    """Replace the weakest directions of the sum by each task's own, then one singular value for all (Iso-CTS).

    Args:
        common: the share of directions that the sum keeps.

    Source: Marczak et al. 2025, arXiv 2502.04959.
    """
    xp = array_namespace(*vectors)
    summed, tasks = sum(vectors), len(vectors)
    rank = min(vectors[0].shape)
    own = round((rank - int(common * rank)) / tasks)  # half to even
    if own == 0:
        return iso_c(*vectors)
    shared = triplets(summed, rank - own * tasks)
    parts = [triplets(vector - shared.left @ (shared.left.T @ vector), own) for vector in vectors]
    largest = [part.values[0] for part in (shared, *parts) if part.values.size]
    parts = [_above(part, CUT * max(largest, default=0.0)) for part in (*parts, shared)]
    left = polar(xp.concat([part.left for part in parts], axis=1))
    right = polar(xp.concat([part.right for part in parts], axis=1))
    return sum(part.values.sum() for part in parts) / rank * (left @ right.T)


def gram(*vectors: Array, weights: Literal["equal", "norm"], ridge: float) -> Array:
    """Fit one update to what each task's does on that task's own directions: (Σ c·τ·τᵀτ)(Σ c·τᵀτ + ridge·I)⁻¹.

    By default ActMat; weights="norm" and ridge=1e-8 is WUDI's closed form.

    Args:
        weights: c is 1, or one over the squared norm of the task's matrix.
        ridge: where it is 0 the inverse is the pseudoinverse.

    Source: ActMat, arXiv 2604.01329; Cheng et al. 2025 (WUDI), arXiv 2503.08099.
    """
    squares = [float((vector * vector).sum()) for vector in vectors]
    held = [
        (vector, 1.0 if weights == "equal" else 1 / square)
        for vector, square in zip(vectors, squares, strict=True)
        if square > CUT**2 * max(squares)
    ]
    if not held:
        return vectors[0] * 0.0
    return gram_merge([(c * vector, vector.T @ vector, c) for vector, c in held], ridge)


def gram_merge(terms: list[tuple[Array, Array, float]], ridge: float) -> Array:
    """Return (Σ W·G)(Σ c·G + ridge·I)⁻¹ over (W, G, c), leaving out directions that no G has.

    Args:
        terms: c·W (m, n), G (n, n) symmetric, c.
    """
    fitted = sum(weighted @ square for weighted, square, _ in terms)
    return divided(fitted, sum(c * square for _, square, c in terms), ridge)


def ace(*vectors: Array, epsilon: float) -> Array:
    """Fit one update to the tasks' on covariances estimated from the updates themselves (ACE).

    (Σ τ̃·S_t)(Σ S_t + 1·m)⁻¹, with τ̃ the task's matrix less its column means, S_t = τ̃ᵀτ̃ + epsilon·I, and m the
    column means of Σ τᵀτ.

    Source: arXiv 2603.02945.
    """
    xp = array_namespace(*vectors)
    fitted: Array = 0.0
    covariance: Array = 0.0
    mean: Array = 0.0
    for vector in vectors:
        centred = vector - vector.mean(0)
        square = centred.T @ centred
        fitted += centred @ square + epsilon * centred
        covariance += square
        mean += (vector.T @ vector).mean(0)
    ridge = len(vectors) * epsilon
    # The inverse of a matrix plus a product of two vectors, by Sherman and Morrison. Where no task has anything, the
    # matrix is the ridge alone.
    both = solved(xp.concat([fitted, mean[None]]), covariance, ridge)
    if both is not None:
        first, row = both[:-1], both[-1]
    else:
        squares, axes = above_the_cut(covariance)
        first, row = (((part @ axes) / (squares + ridge)) @ axes.T for part in (fitted, mean))
        outside = mean - (mean @ axes) @ axes.T
        if xp.linalg.vector_norm(outside) > CUT * xp.linalg.vector_norm(mean):
            row = row + outside / ridge
    return first - first.sum(1)[:, None] * row / (1 + row.sum())


def svc(*vectors: Array, merged: Array | None, alpha: float) -> Array:
    """Rescale the singular values of a merged update where the tasks share directions and so count them twice (SVC).

    Args:
        merged: what the vectors were merged to; by default their sum.
        alpha: the least share of a direction that counts as a task's own: .1 after a sum, TIES, DARE, a mean or Iso-C,
            .2 after Iso-CTS, 1 after TSV-M and WUDI.

    Directions of one singular value, as Iso-C makes all of them, no decomposition can tell apart: they are taken
    where the sum of the tasks has its own.

    Source: arXiv 2602.05536.
    """
    summed, xp = sum(vectors), array_namespace(*vectors)
    left, values, right = triplets(summed if merged is None else merged)
    if merged is not None:
        left, right = _settled(left, values, right, summed)
    shares = values * 0.0
    for vector in vectors:
        own = left.T @ vector  # (r, n); the merged update's are values · rightᵀ
        square, product = (own * own).sum(1), values * (own * right.T).sum(1)
        # A task that has nothing in this direction but rounding has no say in it.
        has_a_say = square > (CUT * values) ** 2
        share = xp.where(has_a_say, product / xp.clip(square, 1e-12, None), 0.0)
        shares = shares + xp.clip(share, alpha, None)
    return (left * (len(vectors) * values / shares)) @ right.T


def _settled(left: Array, values: Array, right: Array, reference: Array) -> tuple[Array, Array]:
    """Turn directions of equal singular values to the eigenvectors of what the reference does between them.

    Any turn of both sides gives the same matrix, and which one LAPACK returns depends on its build.

    Args:
        left, values, right: the triplets of a matrix, (m, r), (r), (n, r), the largest first.
        reference: (m, n).
    """
    xp = array_namespace(left)
    sizes = values.tolist()
    edges = [0]
    for i, size in enumerate(sizes):
        if sizes[edges[-1]] - size > _EQUAL * sizes[0]:
            edges.append(i)
    lefts, rights = [], []
    for low, high in pairwise([*edges, len(sizes)]):
        group, across = left[:, low:high], right[:, low:high]
        if high - low > 1:
            between = group.T @ reference @ across
            turn = xp.flip(xp.linalg.eigh(between + between.T)[1], axis=1)
            group, across = group @ turn, across @ turn
        lefts.append(group)
        rights.append(across)
    return xp.concat(lefts, axis=1), xp.concat(rights, axis=1)


def _above(part: Triplets, floor: float) -> Triplets:
    kept = part.values > floor
    return Triplets(part.left[:, kept], part.values[kept], part.right[:, kept])
