"""Spaces of few dimensions that task vectors share, in which low-rank updates are aligned before they are merged."""

from collections.abc import Callable
from functools import reduce

import numpy as np

from clipmerge.ops.decompose import above_the_cut
from clipmerge.types import Floats, Reals


def merge_in(space: str, merge: Callable[..., Reals], *vectors: Reals) -> Floats:
    """Merge matrices in a space that they share, and bring the result back.

    "core": between the rows and the columns that any of them reaches, so that M_t = Uᵀ·τ_t·V is as large as their ranks
    add up to. "knots": Uᵀ·τ_t, which is Σ·V_tᵀ of one SVD of all of them side by side.

    Directions are singular vectors of all matrices side by side, the largest first, each with its largest entry
    positive; those below the cut are left out.

    Args:
        space: "core" or "knots".
        merge: takes the matrices in that space, and gives one of their shape.
        vectors: each (m, n).

    Source: Panariello et al. 2025, arXiv 2509.17786; Stoica et al. 2024 (KnOTS), arXiv 2410.19735.
    """
    matrices = [vector.astype(np.float64, copy=False) for vector in vectors]
    left = _span(matrices)
    if left.size == 0:
        return np.zeros(matrices[0].shape)
    small = [left.T @ matrix for matrix in matrices]
    if space == "knots":
        return np.asarray(left @ merge(*small))
    right = _span([matrix.T for matrix in matrices])
    return np.asarray(left @ merge(*(matrix @ right for matrix in small)) @ right.T)


def _span(matrices: list[Floats]) -> Floats:
    """Return an orthonormal basis (m, r) of what the columns of all matrices (m, n) reach."""
    rows, columns = matrices[0].shape
    if rows <= len(matrices) * columns:  # the smaller Gram matrix
        basis = above_the_cut(reduce(np.add, (matrix @ matrix.T for matrix in matrices)))[1][:, ::-1]
    else:
        stacked = np.hstack(matrices)
        basis = np.linalg.qr(stacked @ above_the_cut(stacked.T @ stacked)[1][:, ::-1])[0]
    largest = np.take_along_axis(basis, np.abs(basis).argmax(0, keepdims=True), 0)
    return np.asarray(basis * np.where(largest < 0, -1.0, 1.0))
