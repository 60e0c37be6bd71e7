"""Singular triplets and polar factors, by eigenvectors of the smaller Gram matrix where that is accurate enough.

The Gram matrix of an m x n matrix costs one product, and its eigenvectors a third of a full SVD or less; but it squares
the condition number: a singular value σ is known to about 1e-16·σ₁²/σ. Where something that small is wanted, LAPACK's
SVD of the matrix itself is taken.
"""

import ctypes
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from clipmerge.types import Floats

CUT = 1e-6
"""Singular values below this share of the largest are rounding: their directions mean nothing and are left out."""

_ACCURATE = 1e-3
"""Singular vectors by the Gram matrix are taken down to this share of the largest value: error about 1e-10."""
_ACCURATE_POLAR = 1e-5
"""And polar factors, for which vectors of close values may mix: error about 1e-6 in one direction of all."""


class Triplets(NamedTuple):
    """Singular triplets, largest first: left (m, k), values (k,), right (n, k)."""

    left: Floats
    values: Floats
    right: Floats


def triplets(matrix: Floats, count: int | None = None, floor: float = 0.0) -> Triplets:
    """Return the `count` largest singular triplets (all by default) of those above `floor` and above the cut.

    Args:
        matrix: (m, n).
    """
    rows, columns = matrix.shape
    most = min(rows, columns)
    count = most if count is None else min(count, most)
    if count == 0 or not matrix.any():
        return Triplets(np.empty((rows, 0)), np.empty(0), np.empty((columns, 0)))
    if rows < columns:
        left, values, right = triplets(matrix.T, count, floor)
        return Triplets(right, values, left)
    squares, vectors = _eigh(matrix.T @ matrix, count)
    if squares[-1] > 0 and squares[0] > _ACCURATE**2 * squares[-1]:
        values, right = np.sqrt(squares[::-1]), vectors[:, ::-1]
        left = matrix @ (right / values)
    else:
        u, values, vt = np.linalg.svd(matrix, full_matrices=False)
        left, values, right = u[:, :count], values[:count], vt[:count].T
    kept = values > max(floor, CUT * values[0])
    return Triplets(left[:, kept], values[kept], right[:, kept])


def polar(matrix: Floats) -> Floats:
    """Return U·Vᵀ of the thin SVD, over singular values above the cut."""
    return polar_and_values(matrix)[0]


def polar_and_values(matrix: Floats) -> tuple[Floats, Floats]:
    """Return the polar factor and the singular values above the cut, in no order."""
    rows, columns = matrix.shape
    if 0 in matrix.shape or not matrix.any():
        return np.zeros(matrix.shape), np.empty(0)
    if rows < columns:
        factor, values = polar_and_values(matrix.T)
        return factor.T, values
    squares, vectors = np.linalg.eigh(matrix.T @ matrix)
    if squares[0] > _ACCURATE_POLAR**2 * squares[-1]:
        values = np.sqrt(squares)
        root = vectors / np.sqrt(values)
        return matrix @ (root @ root.T), values  # a matrix times its transpose costs half a product
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    kept = values > CUT * values[0]
    return left[:, kept] @ right[kept], values[kept]


def above_the_cut(gram: Floats) -> tuple[Floats, Floats]:
    """Return a Gram matrix's eigenvalues, ascending, and their vectors, of singular values above the cut."""
    squares, vectors = np.linalg.eigh(gram)
    kept = squares > CUT**2 * squares.max(initial=0.0)
    return squares[kept], vectors[:, kept]


def _eigh(gram: Floats, count: int) -> tuple[Floats, Floats]:
    """Return the `count` largest eigenvalues, ascending, and their vectors."""
    size = len(gram)
    if 2 * count > size:
        squares, vectors = np.linalg.eigh(gram)
        return squares[size - count :], vectors[:, size - count :]
    return _largest_eigenpairs(gram, count)


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
