"""Low-rank updates merged in their core space and in KnOTS's: against the papers' formulas over the factors."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from numpy.linalg import svd

from clipmerge.ops import matrices, vectors
from clipmerge.ops.spaces import merge_in

F64 = np.ndarray
Rule = Callable[..., F64]
RANKS = (2, 3, 2)
BY_MATRICES: dict[str, Rule] = {
    "tsv": matrices.tsv,
    "iso_c": matrices.iso_c,
    "iso_cts": partial(matrices.iso_cts, common=0.5),
    "gram": partial(matrices.gram, weights="equal", ridge=0.0),
    "sum": vectors.total,
}
BY_ENTRIES: dict[str, Rule] = {
    "ties": partial(vectors.ties, density=0.3, scope="tensor"),
    "magmax": vectors.magmax,
    "consensus": partial(vectors.consensus, threshold=0.4, least=2),
    "breadcrumbs": partial(vectors.breadcrumbs, beta=0.1, gamma=0.5),
    "dare": partial(vectors.dare, name="w", p=0.5, seed=0),
}


def factors(shape: tuple[int, int] = (20, 16), seed: int = 0) -> list[tuple[F64, F64]]:
    """(B, A) of each task."""
    rng = np.random.default_rng(seed)
    return [(rng.standard_normal((shape[0], r)), rng.standard_normal((r, shape[1]))) for r in RANKS]


def core_straight(merge: Rule, pairs: list[tuple[F64, F64]]) -> F64:
    """U = orth([B …]), V = orth([A; …]), M_t = (UᵀB)(AV), ΔW = U·M·Vᵀ."""
    u = svd(np.hstack([b for b, _ in pairs]), full_matrices=False)[0]
    v = svd(np.vstack([a for _, a in pairs]), full_matrices=False)[2].T
    return u @ merge(*((u.T @ b) @ (a @ v) for b, a in pairs)) @ v.T


def knots_straight(merge: Rule, updates: list[F64]) -> F64:
    """U, S, [V_1 …] = svd([ΔW_1 …]); ΔW = U·merge(S·V_1ᵀ, …)."""
    u, s, vt = svd(np.hstack(updates), full_matrices=False)
    u, vt = u[:, s > 1e-9], s[s > 1e-9, None] * vt[s > 1e-9]
    return u @ merge(*np.split(vt, len(updates), axis=1))


def close(left: F64, right: F64, most: float = 1e-10) -> None:
    assert np.linalg.norm(left - right) < most * np.linalg.norm(right)


@pytest.mark.parametrize("shape", [(20, 16), (16, 20), (100, 9), (9, 100)])
@pytest.mark.parametrize("name", sorted(BY_MATRICES))
def test_the_core_space_of_factors(name: str, shape: tuple[int, int]) -> None:
    """Rules that turn with their matrices do not mind which basis it is."""
    pairs = factors(shape)
    expected = core_straight(BY_MATRICES[name], pairs)
    close(merge_in("core", BY_MATRICES[name], *(b @ a for b, a in pairs)), expected, 1e-8)
    stored = [(b @ a).astype("f4") for b, a in pairs]  # as adapters are read: rounding adds no direction
    close(merge_in("core", BY_MATRICES[name], *stored), expected, 1e-5)


@pytest.mark.parametrize("shape", [(20, 16), (100, 9)])
@pytest.mark.parametrize("name", sorted(BY_ENTRIES))
def test_the_space_of_knots(name: str, shape: tuple[int, int]) -> None:
    """Entries are ranked and signs elected along the directions of one SVD of all updates, whatever their signs."""
    updates = [b @ a for b, a in factors(shape)]
    close(merge_in("knots", BY_ENTRIES[name], *updates), knots_straight(BY_ENTRIES[name], updates), 1e-8)


def test_ties_in_the_core_space_by_hand() -> None:
    """Directions are coordinates here: TIES between the entries of the small matrices."""
    one, two = np.zeros((2, 5, 4))
    one[:2, :2], two[:2, :2] = [[4.0, 1.0], [0.0, 2.0]], [[4.0, -1.5], [0.0, 0.5]]
    # (entries that cancel, so that the Gram matrices are diagonal)
    two[1, 0], one[1, 0] = 1.0, -1.0
    merged = merge_in("core", partial(vectors.ties, density=1.0), one, two)
    left = svd(np.hstack([one, two]))[0][:, :2]
    right = svd(np.vstack([one, two]))[2][:2].T
    small = vectors.ties(left.T @ one @ right, left.T @ two @ right, density=1.0)
    close(merged, left @ small @ right.T)
    assert not merged[2:].any()
    assert not merged[:, 2:].any()


@pytest.mark.parametrize("space", ["core", "knots"])
def test_laws(space: str) -> None:
    updates = [b @ a for b, a in factors()]
    close(merge_in(space, vectors.total, *updates), sum(updates))  # nothing is lost on the way
    close(merge_in(space, matrices.tsv, updates[0]), updates[0])
    everything = {**BY_MATRICES, **BY_ENTRIES}
    for merge in everything.values():
        result = merge_in(space, merge, *updates)
        close(merge_in(space, merge, *(7 * update for update in updates)), 7 * result, 1e-8)
        assert np.linalg.matrix_rank(result, tol=1e-9 * np.linalg.norm(result)) <= sum(RANKS)
        zero = np.zeros((6, 5))
        assert not merge_in(space, merge, zero, zero).any()
    full = [np.random.default_rng(i).standard_normal((6, 9)) for i in range(2)]
    close(merge_in(space, matrices.tsv, *full), matrices.tsv(*full))  # updates of full rank: only turned


def test_a_long_table_is_never_squared() -> None:
    """Token embeddings have 49,408 rows: a square of them would not fit."""
    rng = np.random.default_rng(0)
    updates = [rng.standard_normal((49_408, 2)) @ rng.standard_normal((2, 8)) for _ in range(2)]
    for space in ("core", "knots"):
        close(merge_in(space, vectors.total, *updates), sum(updates))


def test_tsv_gives_each_task_its_rank() -> None:
    """In the core space a task's share of directions is its rank, not a share of the layer's."""
    pairs = [(b[:, :2], a[:2]) for b, a in factors()]
    updates = [b @ a for b, a in pairs]
    close(merge_in("core", matrices.tsv, *updates), matrices.tsv(*updates), 1e-8)
