"""Singular triplets and polar factors, by eigenvectors of the smaller Gram matrix where that is accurate enough.

The Gram matrix of an m x n matrix costs one product, and its eigenvectors a third of a full SVD or less; but it squares
the condition number: a singular value σ is known to about 1e-16·σ₁²/σ. Where something that small is wanted, LAPACK's
SVD of the matrix itself is taken.

Matrices are arrays of numpy, or of torch on a GPU.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from array_api_compat import array_namespace

from clipmerge.types import Array, Floats

CUT = 1e-6
"""Singular values below this share of the largest are rounding: their directions mean nothing and are left out."""

_ACCURATE = 1e-3
"""Singular vectors by the Gram matrix are taken down to this share of the largest value: error about 1e-10."""
_ACCURATE_POLAR = 1e-5
"""And polar factors, for which weak directions may mix: orthogonal to 1e-12, and turned by at most about 1e-6."""


class Triplets(NamedTuple):
    """Singular triplets, largest first: left (m, k), values (k,), right (n, k)."""

    left: Array
    values: Array
    right: Array


def triplets(matrix: Array, count: int | None = None, floor: float = 0.0) -> Triplets:
    """Return the `count` largest singular triplets (all by default) of those above `floor` and above the cut.

    Args:
        matrix: (m, n).
    """
    rows, columns = matrix.shape
    most = min(rows, columns)
    count = most if count is None else min(count, most)
    if count == 0 or not matrix.any():
        return Triplets(matrix[:, :0], matrix.reshape(-1)[:0], matrix.T[:, :0])
    if rows < columns:
        left, values, right = triplets(matrix.T, count, floor)
        return Triplets(right, values, left)
    xp = array_namespace(matrix)
    squares, vectors = _eigh(matrix.T @ matrix, count)
    if squares[-1] > 0 and squares[0] > _ACCURATE**2 * squares[-1]:
        values, right = xp.sqrt(xp.flip(squares)), xp.flip(vectors, axis=1)
        left = matrix @ (right / values)
    else:
        u, values, vt = xp.linalg.svd(matrix, full_matrices=False)
        left, values, right = u[:, :count], values[:count], vt[:count].T
    kept = values > max(floor, CUT * values[0])
    return Triplets(left[:, kept], values[kept], right[:, kept])


def polar(matrix: Array) -> Array:
    """Return U·Vᵀ of the thin SVD, over singular values above the cut."""
    return polar_and_values(matrix)[0]


def polar_and_values(matrix: Array) -> tuple[Array, Array]:
    """Return the polar factor and the singular values above the cut, in no order."""
    rows, columns = matrix.shape
    if 0 in matrix.shape or not matrix.any():
        return matrix * 0.0, matrix.reshape(-1)[:0]
    if rows < columns:
        factor, values = polar_and_values(matrix.T)
        return factor.T, values
    xp = array_namespace(matrix)
    squares, vectors = xp.linalg.eigh(matrix.T @ matrix)
    if squares[0] > _ACCURATE_POLAR**2 * squares[-1]:
        values = xp.sqrt(squares)
        root = vectors / xp.sqrt(values)
        factor = matrix @ (root @ root.T)  # a matrix times its transpose costs half a product
        if (
            squares[0] <= _ACCURATE**2 * squares[-1]
        ):  # a step of Newton and Schulz: every singular value is 1 again
            factor = 1.5 * factor - 0.5 * (factor @ (factor.T @ factor))
        return factor, values
    left, values, right = xp.linalg.svd(matrix, full_matrices=False)
    kept = values > CUT * values[0]
    return left[:, kept] @ right[kept], values[kept]


def above_the_cut(gram: Array) -> tuple[Array, Array]:
    """Return a Gram matrix's eigenvalues, ascending, and their vectors, of singular values above the cut."""
    squares, vectors = array_namespace(gram).linalg.eigh(gram)
    kept = squares > CUT**2 * squares[-1:]  # none where the largest is no more than 0
    return squares[kept], vectors[:, kept]


def _eigh(gram: Array, count: int) -> tuple[Array, Array]:
    """Return the `count` largest eigenvalues, ascending, and their vectors."""
    size = len(gram)
    if 2 * count <= size and isinstance(gram, np.ndarray):
        return _largest_eigenpairs(gram, count)
    squares, vectors = array_namespace(gram).linalg.eigh(gram)
    return squares[size - count :], vectors[:, size - count :]


def _largest_eigenpairs(gram: Floats, count: int) -> tuple[Floats, Floats]:
    """Return the same by LAPACK's dsyevr, in two thirds of a full decomposition's time.

    It is called by its address: scipy's own wrapper keeps other threads from running meanwhile.
    """
    size = len(gram)
    dsyevr = _address_of_dsyevr()
    if dsyevr is None:
        from scipy.linalg import eigh

        squares, vectors = eigh(
            gram, subset_by_index=[size - count, size - 1], driver="evr", check_finite=False
        )
        return squares, vectors
    matrix, values = np.array(gram, np.float64), np.empty(size)
    vectors, support = np.empty((count, size)), np.empty(2 * count, np.int32)  # columns of LAPACK's
    work, integers = np.empty(64 * size), np.empty(10 * size, np.int32)
    info = ctypes.c_int(0)

    def integer(value: int) -> Any:
        return ctypes.byref(ctypes.c_int(value))

    def number(value: float) -> Any:
        return ctypes.byref(ctypes.c_double(value))

    dsyevr(
        b"V", b"I", b"L", integer(size), matrix.ctypes, integer(size), number(0), number(0),
        integer(size - count + 1), integer(size), number(0), integer(0), values.ctypes, vectors.ctypes, integer(size),
        support.ctypes, work.ctypes, integer(work.size), integers.ctypes, integer(integers.size), ctypes.byref(info),
    )  # fmt: skip
    if info.value:
        raise np.linalg.LinAlgError(f"dsyevr did not converge ({info.value})")
    return values[:count], vectors.T


@cache
def _address_of_dsyevr() -> Callable[..., None] | None:
    """Return LAPACK's function as scipy lends it to compiled code, None where its integers have another size."""
    from scipy.linalg import cython_lapack

    capsule = cython_lapack.__pyx_capi__["dsyevr"]
    name_of, address_of = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.py_object]
    address_of.restype, address_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    signature: bytes = name_of(capsule)
    if signature.count(b" int *") != 11:
        return None
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 21)(address_of(capsule, signature))
