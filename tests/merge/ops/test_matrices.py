"""Rules for matrices: the papers' formulas written straight down, laws, and input that leaves directions undefined."""

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
from numpy.linalg import inv, norm, pinv, svd

from clipmerge.ops import decompose
from clipmerge.ops.decompose import polar
from clipmerge.ops.matrices import ace, gram, iso_c, iso_cts, svc, tsv

F64 = np.ndarray
Rule = Callable[..., F64]
RULES: dict[str, Rule] = {
    "tsv": tsv,
    "iso_c": iso_c,
    "iso_cts": partial(iso_cts, common=0.8),
    "actmat": partial(gram, weights="equal", ridge=0.0),
    "wudi": partial(gram, weights="norm", ridge=1e-8),
    "ace": partial(ace, epsilon=1e-5),
    "svc": partial(svc, merged=None, alpha=0.1),
}


def draw(count: int, shape: tuple[int, int] = (24, 20), seed: int = 0) -> list[F64]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for _ in range(count)]


def polar_straight(matrix: F64) -> F64:
    u, _, vt = svd(matrix, full_matrices=False)
    return u @ vt


def tsv_straight(*tasks: F64) -> F64:
    k = min(tasks[0].shape) // len(tasks)
    parts = [svd(task, full_matrices=False) for task in tasks]
    u = polar_straight(np.hstack([u[:, :k] for u, _, _ in parts]))
    v = polar_straight(np.hstack([vt[:k].T for _, _, vt in parts]))
    return u @ np.diag(np.concatenate([s[:k] for _, s, _ in parts])) @ v.T


def iso_c_straight(*tasks: F64) -> F64:
    u, s, vt = svd(sum(tasks), full_matrices=False)
    return s.mean() * u @ vt


def iso_cts_straight(*tasks: F64) -> F64:
    r, count = min(tasks[0].shape), len(tasks)
    own = round((r - int(0.8 * r)) / count)
    common = r - own * count
    u, s, vt = svd(sum(tasks), full_matrices=False)
    us, ss, vs = [], [], []
    for task in tasks:
        a, b, ct = svd(task - u[:, :common] @ u[:, :common].T @ task, full_matrices=False)
        us, ss, vs = [*us, a[:, :own]], [*ss, b[:own]], [*vs, ct[:own].T]
    u, v = np.hstack([*us, u[:, :common]]), np.hstack([*vs, vt[:common].T])
    return np.mean(np.concatenate([*ss, s[:common]])) * polar_straight(u) @ polar_straight(v).T


def actmat_straight(*tasks: F64) -> F64:
    return sum(t @ t.T @ t for t in tasks) @ pinv(sum(t.T @ t for t in tasks))


def wudi_straight(*tasks: F64) -> F64:
    c = [1 / norm(t) ** 2 for t in tasks]
    inverse = inv(
        sum(ci * t.T @ t for ci, t in zip(c, tasks, strict=True)) + 1e-8 * np.eye(tasks[0].shape[1])
    )
    return sum(ci * t @ t.T @ t for ci, t in zip(c, tasks, strict=True)) @ inverse


def ace_straight(*tasks: F64) -> F64:
    centred = [t - t.mean(0) for t in tasks]
    size = tasks[0].shape[1]
    squares = [w.T @ w + 1e-5 * np.eye(size) for w in centred]
    a = sum(squares) + np.ones((size, 1)) @ sum(t.T @ t for t in tasks).mean(0, keepdims=True)
    return sum(w @ s for w, s in zip(centred, squares, strict=True)) @ inv(a)


def svc_straight(*tasks: F64) -> F64:
    u, s, vt = svd(sum(tasks), full_matrices=False)
    out = np.zeros(tasks[0].shape)
    for r in range(len(s)):
        a = u[:, r] @ sum(tasks)
        shares = [max(0.1, a @ (u[:, r] @ t) / max(norm(u[:, r] @ t) ** 2, 1e-12)) for t in tasks]
        out += len(tasks) / sum(shares) * s[r] * np.outer(u[:, r], vt[r])
    return out


@pytest.mark.parametrize("shape", [(24, 20), (20, 24), (24, 24), (60, 9), (5, 40)])
@pytest.mark.parametrize("name", RULES)
def test_is_the_straight_version(name: str, shape: tuple[int, int]) -> None:
    tasks = draw(4, shape)
    expected = globals()[f"{name}_straight"](*tasks)
    assert norm(RULES[name](*tasks) - expected) <= 1e-8 * norm(expected)  # the straight inverses err by that


@pytest.mark.parametrize("decay", [1e-2, 1e-4, 1e-5])
@pytest.mark.parametrize("name", ["tsv", "iso_c", "iso_cts"])
def test_spectra_that_a_gram_matrix_cannot_hold(name: str, decay: float) -> None:
    """The smallest singular value of each task is `decay` times the largest; the square of 1e-5 is lost in float64's
    last digits, so the fast way must give way."""
    tasks = []
    for task in draw(4, (40, 32)):
        u, _, vt = svd(task, full_matrices=False)
        tasks.append(u * np.geomspace(1.0, decay, 32) @ vt)
    expected = globals()[f"{name}_straight"](*tasks)
    assert norm(RULES[name](*tasks) - expected) <= 1e-6 * norm(expected)


@pytest.mark.parametrize("name", ["tsv", "actmat", "svc"])
def test_one_task_is_its_vector(name: str) -> None:
    (task,) = draw(1)
    np.testing.assert_allclose(RULES[name](task), task, atol=1e-8)


def test_one_task_gets_one_singular_value_from_iso() -> None:
    (task,) = draw(1)
    for rule in (iso_c, RULES["iso_cts"]):
        np.testing.assert_allclose(svd(rule(task))[1], svd(task)[1].mean(), rtol=1e-9)


@pytest.mark.parametrize("name", RULES)
def test_the_order_does_not_matter(name: str) -> None:
    a, b, c = draw(3)
    np.testing.assert_allclose(RULES[name](a, b, c), RULES[name](c, a, b), atol=1e-9)


def test_tsv_of_disjoint_spaces_is_the_sum() -> None:
    tasks = [np.zeros((24, 20)) for _ in range(2)]
    tasks[0][:12, :10], tasks[1][12:, 10:] = draw(2, (12, 10))
    np.testing.assert_allclose(tsv(*tasks), sum(tasks), atol=1e-9)


@pytest.mark.parametrize("rule", [tsv, iso_c])
def test_transposition_commutes(rule: Rule) -> None:
    tasks = draw(3)
    np.testing.assert_allclose(rule(*(t.T for t in tasks)), rule(*tasks).T, atol=1e-9)


def test_iso_cts_projects_from_the_left() -> None:
    tasks = draw(3, (24, 24))
    assert norm(RULES["iso_cts"](*(t.T for t in tasks)) - RULES["iso_cts"](*tasks).T) > 0.1


@pytest.mark.parametrize("name", ["tsv", "iso_c", "iso_cts", "actmat", "svc"])
def test_is_homogeneous(name: str) -> None:
    tasks = draw(3)
    np.testing.assert_allclose(RULES[name](*(1e-3 * t for t in tasks)), 1e-3 * RULES[name](*tasks), atol=1e-9)


@pytest.mark.parametrize("name", ["actmat", "wudi"])
def test_gram_of_identical_inputs_is_that_input(name: str) -> None:
    (task,) = draw(1)
    np.testing.assert_allclose(RULES[name](task, task, task), task, atol=1e-4 if name == "wudi" else 1e-8)


def test_iso_c_keeps_the_directions_of_a_low_rank_sum_only() -> None:
    """Rank 2 in 24 x 20: the mean is over 20 values, of which 18 are 0, and two directions get it."""
    a, b = draw(1, (24, 2))[0], draw(1, (2, 20), seed=1)[0]
    values = svd(iso_c(a @ b))[1]
    np.testing.assert_allclose(values[:2], svd(a @ b)[1].sum() / 20, rtol=1e-9)
    np.testing.assert_allclose(values[2:], 0, atol=1e-12)


@pytest.mark.parametrize("shape", [(12, 12), (9, 14), (14, 9)])
def test_svc_after_iso_c_does_not_hang_on_the_basis_that_lapack_returns(shape: tuple[int, int]) -> None:
    """All singular values are one: written out with the directions of the sum, which Iso-C keeps."""
    generator = np.random.default_rng(5)
    tasks = [generator.normal(size=shape) for _ in range(3)]
    merged = iso_c(*tasks)
    left, values, right = np.linalg.svd(sum(tasks), full_matrices=False)
    sigma = values.mean()
    shares = np.zeros(len(values))
    for task in tasks:
        own = left.T @ task
        shares += np.maximum(0.1, sigma * (own * right).sum(axis=1) / (own**2).sum(axis=1))
    right_answer = (left * (3 * sigma / shares)) @ right
    np.testing.assert_allclose(svc(*tasks, merged=merged, alpha=0.1), right_answer, rtol=1e-7, atol=1e-9)
    turn = np.linalg.qr(generator.normal(size=(shape[0], shape[0])))[0]  # another basis of the rows' space
    turned = svc(*(turn @ task for task in tasks), merged=turn @ merged, alpha=0.1)
    np.testing.assert_allclose(turn.T @ turned, right_answer, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("weakest", [1e-2, 1.1e-4, 2e-5, 1e-7])
def test_a_polar_factor_has_one_singular_value_however_weak_a_direction_was(weakest: float) -> None:
    """SVC tells directions of one value from others by their values: Iso-C's must be equal."""
    (drawn,) = draw(1, (40, 24))
    u, _, vt = svd(drawn, full_matrices=False)
    found = polar(u * np.geomspace(1, weakest, 24) @ vt)
    values = svd(found, compute_uv=False)
    kept = 24 if weakest > 1e-6 else int((np.geomspace(1, weakest, 24) > 1e-6).sum())
    np.testing.assert_allclose(values[:kept], 1, rtol=0, atol=2e-8)
    np.testing.assert_allclose(values[kept:], 0, rtol=0, atol=1e-11)
    if kept == 24:
        np.testing.assert_allclose(found, u @ vt, atol=1e-6)


def test_svc_undoes_what_is_counted_twice() -> None:
    """Two equal tasks: their sum is twice too long, and SVC gives the task."""
    (task,) = draw(1)
    np.testing.assert_allclose(svc(task, task, merged=None, alpha=0.1), task, atol=1e-9)
    np.testing.assert_allclose(svc(task, task, merged=0.5 * task, alpha=1.0), 0.5 * task, atol=1e-9)


@pytest.mark.parametrize("by_address", [True, False])
@pytest.mark.parametrize(("size", "count"), [(1, 1), (5, 2), (64, 9), (200, 25)])
def test_the_largest_eigenpairs(
    size: int, count: int, by_address: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By LAPACK's address where its integers have 32 bits, else by scipy; here they have."""
    assert decompose._lapack("dsyevr") is not None
    if not by_address:
        monkeypatch.setattr(decompose, "_lapack", lambda _: None)
    matrix = draw(1, (size + 3, size))[0]
    gram = matrix.T @ matrix
    before = gram.copy()
    values, vectors = decompose._largest_eigenpairs(gram, count)
    assert vectors.shape == (size, count)
    np.testing.assert_array_equal(gram, before)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(gram)[size - count :], rtol=1e-12)
    np.testing.assert_allclose(gram @ vectors, vectors * values, atol=1e-11 * values[-1])
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(count), atol=1e-12)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("weakest", [1e-1, 1e-3, 0.9e-4, 1e-5, 0.0])
def test_equations_are_solved_by_the_faster_way_where_it_is_as_good(
    weakest: float, ridge: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Singular values down to 1e-4 of the largest go by Cholesky's factors; the answer is the pseudoinverse's."""
    u, _, vt = svd(draw(1, (40, 24))[0], full_matrices=False)
    laid = u * np.geomspace(1, max(weakest, 1e-9), 24) @ vt
    matrix, square = draw(1, (10, 40), seed=1)[0] @ laid, laid.T @ laid
    fast = decompose.solved(matrix, square, ridge)
    assert (fast is not None) == (weakest >= 1e-3 or ridge > 0)
    found = decompose.divided(matrix, square, ridge)
    monkeypatch.setattr(decompose, "solved", lambda *_: None)
    slow = decompose.divided(matrix, square, ridge)
    assert norm(found - slow) < 1e-5 * norm(slow)  # the slow way leaves out what is below the cut
    if fast is not None and weakest:
        assert norm(slow @ (square + ridge * np.eye(24)) - matrix) < 1e-8 * norm(matrix)


def test_rules_that_fit_give_the_same_by_eigenvectors(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks, wide = draw(4), draw(2, (6, 20))
    every = ("actmat", "wudi", "ace")
    fast = [RULES[name](*given) for name in every for given in (tasks, wide)]
    monkeypatch.setattr(decompose, "_lapack", lambda _: None)
    for ours, (name, given) in zip(fast, [(n, g) for n in every for g in (tasks, wide)], strict=True):
        slow = RULES[name](*given)
        assert norm(ours - slow) < 1e-6 * norm(slow), name
