"""Spaces of few dimensions that task vectors share, in which low-rank updates are aligned before they are merged."""

from collections.abc import Callable, Sequence

from array_api_compat import array_namespace

from clipmerge.ops.decompose import above_the_cut
from clipmerge.types import Array


def merge_in(space: str, merge: Callable[..., Array], *vectors: Array) -> Array:
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
    xp = array_namespace(*vectors)
    matrices = [xp.astype(vector, xp.float64, copy=False) for vector in vectors]
    left = _span(matrices)
    if 0 in left.shape:
        return matrices[0] * 0.0
    small = [left.T @ matrix for matrix in matrices]
    if space == "knots":
        return left @ merge(*small)
    right = _span([matrix.T for matrix in matrices])
    return left @ merge(*(matrix @ right for matrix in small)) @ right.T


def _span(matrices: Sequence[Array]) -> Array:
    """Return an orthonormal basis (m, r) of what the columns of all matrices (m, n) reach."""
    xp = array_namespace(*matrices)
    rows, columns = matrices[0].shape
    if rows <= len(matrices) * columns:  # the smaller Gram matrix
        basis = xp.flip(above_the_cut(sum(matrix @ matrix.T for matrix in matrices))[1], axis=1)
    else:
        stacked = xp.concat(list(matrices), axis=1)
        reached = xp.flip(above_the_cut(stacked.T @ stacked)[1], axis=1)
        basis = xp.linalg.qr(stacked @ reached)[0]
    if 0 in basis.shape:
        return basis
    largest = xp.take_along_axis(basis, xp.argmax(xp.abs(basis), axis=0, keepdims=True), axis=0)
    return xp.where(largest < 0, -basis, basis)
