"""Rules that take task vectors and give a task vector, one matrix (out, in) at a time, in float64.

Directions whose singular value is rounding (below `CUT` of the largest) are left out: an update of rank 2 has two
directions, and what an SVD returns beside them would be invented.
"""

from functools import reduce
from typing import Literal

import numpy as np

from clipmerge.ops.decompose import CUT, Triplets, above_the_cut, polar, polar_and_values, triplets
from clipmerge.ops.vectors import total
from clipmerge.types import Floats

_EQUAL = 1e-9
"""Singular values that differ by less of the largest are one: rounding in float64 stays far below."""


def tsv(*vectors: Floats) -> Floats:
    """Keep each task's first 1/T of singular triplets, make them orthogonal across tasks, and add them (TSV-M).

    Source: Gargiulo et al. 2025, arXiv 2412.00081.
    """
    if len(vectors) == 1:
        return np.array(vectors[0])
    count = max(1, min(vectors[0].shape) // len(vectors))
    parts = [triplets(vector, count) for vector in vectors]
    floor = CUT * max((part.values[0] for part in parts if part.values.size), default=0.0)
    parts = [_above(part, floor) for part in parts]
    left = polar(np.hstack([part.left for part in parts]))
    right = polar(np.hstack([part.right for part in parts]))
    return np.asarray((left * np.concatenate([part.values for part in parts])) @ right.T)


def iso_c(*vectors: Floats) -> Floats:
    """Give the sum of task vectors one and the same singular value, the mean of its own (Iso-C).

    Source: Marczak et al. 2025, arXiv 2502.04959.
    """
    factor, values = polar_and_values(total(*vectors))
    return np.asarray(values.sum() / max(min(factor.shape), 1) * factor)


def iso_cts(*vectors: Floats, common: float) -> Floats:
    """Replace the weakest directions of the sum by each task's own, then one singular value for all (Iso-CTS).

    Args:
        common: the share of directions that the sum keeps.

    Source: Marczak et al. 2025, arXiv 2502.04959.
    """
    summed, tasks = total(*vectors), len(vectors)
    rank = min(summed.shape)
    own = round((rank - int(common * rank)) / tasks)  # half to even
    shared = triplets(summed, rank - own * tasks)
    if own == 0:
        return iso_c(*vectors)
    parts = [triplets(vector - shared.left @ (shared.left.T @ vector), own) for vector in vectors]
    largest = [part.values[0] for part in (shared, *parts) if part.values.size]
    parts = [_above(part, CUT * max(largest, default=0.0)) for part in (*parts, shared)]
    left = polar(np.hstack([part.left for part in parts]))
    right = polar(np.hstack([part.right for part in parts]))
    return np.asarray(sum(part.values.sum() for part in parts) / rank * (left @ right.T))


def gram(*vectors: Floats, weights: Literal["equal", "norm"], ridge: float) -> Floats:
    """Fit one update to what each task's does on that task's own directions: (Σ c·τ·τᵀτ)(Σ c·τᵀτ + ridge·I)⁻¹.

    By default ActMat; weights="norm" and ridge=1e-8 is WUDI's closed form.

    Args:
        weights: c is 1, or one over the squared norm of the task's matrix.
        ridge: where it is 0 the inverse is the pseudoinverse.

    Source: ActMat, arXiv 2604.01329; Cheng et al. 2025 (WUDI), arXiv 2503.08099.
    """
    squares = [float(np.vdot(vector, vector)) for vector in vectors]
    held = [
        (vector, 1.0 if weights == "equal" else 1 / square)
        for vector, square in zip(vectors, squares, strict=True)
        if square > CUT**2 * max(squares)
    ]
    if not held:
        return np.zeros(vectors[0].shape)
    return gram_merge([(c * vector, vector.T @ vector, c) for vector, c in held], ridge)


def gram_merge(terms: list[tuple[Floats, Floats, float]], ridge: float) -> Floats:
    """Return (Σ W·G)(Σ c·G + ridge·I)⁻¹ over (W, G, c), leaving out directions that no G has.

    Args:
        terms: c·W (m, n), G (n, n) symmetric, c.
    """
    fitted = sum(weighted @ square for weighted, square, _ in terms)
    squares, basis = above_the_cut(reduce(np.add, (c * square for _, square, c in terms)))
    return np.asarray((fitted @ basis / (squares + ridge)) @ basis.T)


def ace(*vectors: Floats, epsilon: float) -> Floats:
    """Fit one update to the tasks' on covariances estimated from the updates themselves (ACE).

    (Σ τ̃·S_t)(Σ S_t + 1·m)⁻¹, with τ̃ the task's matrix less its column means, S_t = τ̃ᵀτ̃ + epsilon·I, and m the
    column means of Σ τᵀτ.

    Source: arXiv 2603.02945.
    """
    size = vectors[0].shape[1]
    fitted, covariance, mean = np.zeros(vectors[0].shape), np.zeros((size, size)), np.zeros(size)
    for vector in vectors:
        centred = vector - vector.mean(0)
        square = centred.T @ centred
        fitted += centred @ square + epsilon * centred
        covariance += square
        mean += (vector.T @ vector).mean(0)
    squares, axes = above_the_cut(covariance)
    ridge = len(vectors) * epsilon
    inverse = 1 / (squares + ridge)
    # The inverse of a matrix plus a product of two vectors, by Sherman and Morrison. Where no task has anything, the
    # matrix is the ridge alone.
    solved, inside = (fitted @ axes * inverse) @ axes.T, mean @ axes
    outside = mean - inside @ axes.T
    row = (inside * inverse) @ axes.T
    if np.linalg.norm(outside) > CUT * np.linalg.norm(mean):
        row += outside / ridge
    return np.asarray(solved - np.outer(solved.sum(1), row) / (1 + row.sum()))


def svc(*vectors: Floats, merged: Floats | None, alpha: float) -> Floats:
    """Rescale the singular values of a merged update where the tasks share directions and so count them twice (SVC).

    Args:
        merged: what the vectors were merged to; by default their sum.
        alpha: the least share of a direction that counts as a task's own: .1 after a sum, TIES, DARE, a mean or Iso-C,
            .2 after Iso-CTS, 1 after TSV-M and WUDI.

    Directions of one singular value, as Iso-C makes all of them, no decomposition can tell apart: they are taken
    where the sum of the tasks has its own.

    Source: arXiv 2602.05536.
    """
    summed = total(*vectors)
    left, values, right = triplets(summed if merged is None else merged)
    if merged is not None:
        left, right = _settled(left, values, right, summed)
    shares = np.zeros(values.shape)
    for vector in vectors:
        own = left.T @ vector  # (r, n); the merged update's are values · rightᵀ
        square = np.einsum("rn,rn->r", own, own)
        product = values * np.einsum("nr,rn->r", right, own)
        # A task that has nothing in this direction but rounding has no say in it.
        square_or_none = np.where(square > (CUT * values) ** 2, np.maximum(square, 1e-12), np.inf)
        shares += np.maximum(alpha, product / square_or_none)
    return (left * (len(vectors) * values / shares)) @ right.T


def _settled(left: Floats, values: Floats, right: Floats, reference: Floats) -> tuple[Floats, Floats]:
    """Turn directions of equal singular values to the eigenvectors of what the reference does between them.

    Any turn of both sides gives the same matrix, and which one LAPACK returns depends on its build.

    Args:
        left, values, right: the triplets of a matrix, (m, r), (r), (n, r), the largest first.
        reference: (m, n).
    """
    left, right = left.copy(), right.copy()
    edges = np.flatnonzero(-np.diff(values) > _EQUAL * values[:1]) + 1
    for group in np.split(np.arange(len(values)), edges):
        if len(group) > 1:
            between = left[:, group].T @ reference @ right[:, group]
            turn = np.linalg.eigh(between + between.T)[1][:, ::-1]
            left[:, group], right[:, group] = left[:, group] @ turn, right[:, group] @ turn
    return left, right


def _above(part: Triplets, floor: float) -> Triplets:
    kept = part.values > floor
    return Triplets(part.left[:, kept], part.values[kept], part.right[:, kept])
