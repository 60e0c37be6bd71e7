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
"""And polar factors, for which weak directions may mix: error about 1e-6 in one direction of all."""
_EVEN = 1e-4
"""Where a direction is weaker than this share, singular values of a polar factor by the Gram matrix differ by 1e-8."""
_WELL_CONDITIONED = 1e-8
"""Equations are solved by Cholesky's factors where their condition is better than one over this: error about 1e-8."""


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
    """Return the polar factor and the singular values above the cut, in no order.

    The factor's own singular values are equal to 1e-8, however weak a direction of the matrix was.
    """
    rows, columns = matrix.shape
    if rows < columns:
        factor, values = polar_and_values(matrix.T)
        return factor.T, values
    one, other, values = polar_in_two(matrix)
    factor = one @ other
    if values.shape[0] and values.min() <= _EVEN * values.max():  # one step of Newton and Schulz
        factor = 1.5 * factor - 0.5 * (factor @ (factor.T @ factor))
    return factor, values


def polar_in_two(matrix: Array) -> tuple[Array, Array, Array]:
    """Return two matrices whose product is the polar factor, and the singular values above the cut, in no order."""
    rows, columns = matrix.shape
    if 0 in matrix.shape or not matrix.any():
        return matrix[:, :0], matrix[:0], matrix.reshape(-1)[:0]
    if rows < columns:
        one, other, values = polar_in_two(matrix.T)
        return other.T, one.T, values
    xp = array_namespace(matrix)
    squares, vectors = xp.linalg.eigh(matrix.T @ matrix)
    if squares[0] > _ACCURATE_POLAR**2 * squares[-1]:
        values = xp.sqrt(squares)
        root = vectors / xp.sqrt(values)
        return matrix, root @ root.T, values  # a matrix times its transpose costs half a product
    left, values, right = xp.linalg.svd(matrix, full_matrices=False)
    kept = values > CUT * values[0]
    return left[:, kept], right[kept], values[kept]


def above_the_cut(gram: Array) -> tuple[Array, Array]:
    """Return a Gram matrix's eigenvalues, ascending, and their vectors, of singular values above the cut."""
    squares, vectors = array_namespace(gram).linalg.eigh(gram)
    kept = squares > CUT**2 * squares[-1:]  # none where the largest is no more than 0
    return squares[kept], vectors[:, kept]


def divided(matrix: Array, gram: Array, ridge: float) -> Array:
    """Return matrix·(gram + ridge·I)⁻¹ over the directions of the Gram matrix above the cut.

    Args:
        matrix: (m, n), of which every row lies in what the Gram matrix reaches. gram: (n, n).
    """
    solution = solved(matrix, gram, ridge)
    if solution is not None:
        return solution
    squares, basis = above_the_cut(gram)
    return (matrix @ basis / (squares + ridge)) @ basis.T


def solved(matrix: Array, gram: Array, ridge: float) -> Array | None:
    """Return matrix·(gram + ridge·I)⁻¹ by Cholesky's factors, a tenth of eigenvectors' time; None if badly conditioned.

    A GPU has eigenvectors soon enough, and is not asked.
    """
    if not isinstance(gram, np.ndarray) or gram.size == 0:
        return None
    dpotrf, dpocon, dpotrs = map(_lapack, ("dpotrf", "dpocon", "dpotrs"))
    if dpotrf is None or dpocon is None or dpotrs is None:
        return None
    size, info, condition = _integer(len(gram)), ctypes.c_int(0), ctypes.c_double(0)
    factor, solution = np.array(gram, np.float64), np.array(matrix, np.float64, order="C")
    factor[np.diag_indices_from(factor)] += ridge
    norm = ctypes.byref(ctypes.c_double(float(np.abs(factor).sum(0).max())))
    dpotrf(b"L", size, factor.ctypes, size, ctypes.byref(info))
    if info.value:
        return None
    work, integers = np.empty(3 * len(gram)), np.empty(len(gram), np.int32)
    dpocon(
        b"L", size, factor.ctypes, size, norm, ctypes.byref(condition), work.ctypes, integers.ctypes, ctypes.byref(info)
    )  # fmt: skip
    if not condition.value > _WELL_CONDITIONED:
        return None
    # Rows of a C-ordered matrix are columns of LAPACK's, which solves for columns.
    dpotrs(b"L", size, _integer(len(matrix)), factor.ctypes, size, solution.ctypes, size, ctypes.byref(info))
    return solution


def _eigh(gram: Array, count: int) -> tuple[Array, Array]:
    """Return the `count` largest eigenvalues, ascending, and their vectors."""
    size = len(gram)
    if 2 * count <= size and isinstance(gram, np.ndarray):
        return _largest_eigenpairs(gram, count)
    squares, vectors = array_namespace(gram).linalg.eigh(gram)
    return squares[size - count :], vectors[:, size - count :]


def _largest_eigenpairs(gram: Floats, count: int) -> tuple[Floats, Floats]:
    """Return the same by LAPACK's dsyevr, in two thirds of a full decomposition's time."""
    size = len(gram)
    dsyevr = _lapack("dsyevr")
    if dsyevr is None:
        from scipy.linalg import eigh

        squares, vectors = eigh(
            gram, subset_by_index=[size - count, size - 1], driver="evr", check_finite=False
        )
        return squares, vectors
    matrix, values = np.array(gram, np.float64), np.empty(size)
    vectors, support = np.empty((count, size)), np.empty(2 * count, np.int32)  # columns of LAPACK's
    work, integers = np.empty(64 * size), np.empty(10 * size, np.int32)
    info, none = ctypes.c_int(0), ctypes.byref(ctypes.c_double(0))
    dsyevr(
        b"V", b"I", b"L", _integer(size), matrix.ctypes, _integer(size), none, none,
        _integer(size - count + 1), _integer(size), none, _integer(0), values.ctypes, vectors.ctypes, _integer(size),
        support.ctypes, work.ctypes, _integer(work.size), integers.ctypes, _integer(integers.size), ctypes.byref(info),
    )  # fmt: skip
    if info.value:
        raise np.linalg.LinAlgError(f"dsyevr did not converge ({info.value})")
    return values[:count], vectors.T


def _integer(value: int) -> Any:
    return ctypes.byref(ctypes.c_int(value))


@cache
def _lapack(name: str) -> Callable[..., None] | None:
    """Return a function of LAPACK as scipy lends it to compiled code, None where its integers have another size.

    It is called by its address: scipy's own wrappers keep other threads from running meanwhile.
    """
    from scipy.linalg import cython_lapack

    capsule = cython_lapack.__pyx_capi__[name]
    name_of, address_of = ctypes.pythonapi.PyCapsule_GetName, ctypes.pythonapi.PyCapsule_GetPointer
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.py_object]
    address_of.restype, address_of.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    signature: bytes = name_of(capsule)
    if b" int *" not in signature:
        return None
    arguments = [ctypes.c_void_p] * (signature.count(b",") + 1)
    return ctypes.CFUNCTYPE(None, *arguments)(address_of(capsule, signature))
