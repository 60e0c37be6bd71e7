"""Rules that take models and give a model: laws, and values by an independent formula."""

from collections.abc import Callable
from itertools import combinations

import numpy as np
import numpy.typing as npt
import pytest

from clipmerge.ops.points import cart, geometric_median, karcher, model_stock, slerp

F64 = npt.NDArray[np.float64]


@pytest.fixture
def draw() -> Callable[[], F64]:
    rng = np.random.default_rng(3)
    return lambda: rng.standard_normal((4, 5))


def test_slerp_ends_at_its_ends(draw: Callable[[], F64]) -> None:
    a, b = draw(), draw()
    np.testing.assert_allclose(slerp(a, b, alpha=0.0), a, rtol=1e-14)
    np.testing.assert_allclose(slerp(a, b, alpha=1.0), b, rtol=1e-14)


def test_slerp_walks_the_arc() -> None:
    """Between unit vectors the result is a unit vector at the fraction t of the angle."""
    a, b = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    for t in (0.1, 0.25, 0.5, 0.9):
        expected = [np.cos(t * np.pi / 2), np.sin(t * np.pi / 2)]
        np.testing.assert_allclose(slerp(a, b, alpha=t), expected, rtol=1e-14)


def test_slerp_is_the_same_backwards(draw: Callable[[], F64]) -> None:
    a, b = draw(), draw()
    np.testing.assert_allclose(slerp(a, b, alpha=0.3), slerp(b, a, alpha=0.7), rtol=1e-13)


@pytest.mark.parametrize("b", [[2.0, 4.0], [-1.0, -2.0], [0.0, 0.0]])
def test_slerp_is_a_straight_line_where_no_arc_exists(b: list[float]) -> None:
    """Parallel, opposite, zero."""
    a = np.array([1.0, 2.0])
    np.testing.assert_allclose(slerp(a, np.array(b), alpha=0.25), 0.75 * a + 0.25 * np.array(b), rtol=1e-12)


def test_slerp_of_scalars_and_of_nothing() -> None:
    assert slerp(np.array(2.0), np.array(4.0), alpha=0.5) == 3.0
    assert slerp(np.empty((0, 3)), np.empty((0, 3)), alpha=0.5).shape == (0, 3)


def test_model_stock_by_the_papers_formula(draw: Callable[[], F64]) -> None:
    base = draw()
    points = [base + draw() + 1.0 for _ in range(3)]  # a common drift: positive cosines
    vectors = [(p - base).ravel() for p in points]
    cosines = [u @ v / np.sqrt((u @ u) * (v @ v)) for u, v in combinations(vectors, 2)]
    cosine = np.mean(cosines)
    t = 3 * cosine / (1 + 2 * cosine)
    assert 0 < t < 1
    np.testing.assert_allclose(
        model_stock(base, *points), t * np.mean(points, axis=0) + (1 - t) * base, rtol=1e-13
    )


def test_model_stock_of_equal_models_is_that_model(draw: Callable[[], F64]) -> None:
    base, point = draw(), draw()
    np.testing.assert_allclose(model_stock(base, point, point), point, rtol=1e-13)


def test_model_stock_of_models_at_right_angles_is_the_base() -> None:
    base = np.zeros(2)
    np.testing.assert_allclose(
        model_stock(base, np.array([1.0, 0.0]), np.array([0.0, 1.0])), base, atol=1e-15
    )


def test_model_stock_of_models_that_disagree_is_the_base(draw: Callable[[], F64]) -> None:
    """Our reading: the formula itself would give t = -2 for a cosine of -0.5, and no number for one of -1."""
    base = draw()
    step, across = np.zeros((4, 5)), np.zeros((4, 5))
    step[0, 0], across[0, 1] = 1.0, np.sqrt(3.0)
    np.testing.assert_array_equal(model_stock(base, base + step, base - step / 2 + across / 2), base)
    np.testing.assert_array_equal(model_stock(base, base + step, base - step), base)


def test_model_stock_of_untouched_tensors_is_the_base(draw: Callable[[], F64]) -> None:
    base = draw()
    np.testing.assert_array_equal(model_stock(base, base, base), base)


def test_karcher_of_two_is_halfway_along_the_arc(draw: Callable[[], F64]) -> None:
    a, b = draw(), draw()
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    np.testing.assert_allclose(karcher(a, b), slerp(a, b, alpha=0.5), rtol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(karcher(a, 3 * b)), 2.0)


def test_karcher_is_where_the_arcs_balance(draw: Callable[[], F64]) -> None:
    points = [draw() + 1.0 for _ in range(4)]
    centre = karcher(*points)
    centre = centre / np.linalg.norm(centre)
    pull = np.zeros_like(centre)
    for point in points:
        unit = point / np.linalg.norm(point)
        across = unit - np.vdot(unit, centre) * centre
        pull += np.arccos(np.vdot(unit, centre)) * across / np.linalg.norm(across)
    assert np.linalg.norm(pull) < 1e-8


@pytest.mark.parametrize("rule", [karcher, geometric_median])
def test_equal_models_are_their_own_middle(rule: Callable[..., F64], draw: Callable[[], F64]) -> None:
    point = draw()
    np.testing.assert_allclose(rule(point, point, point), point, rtol=1e-12)
    np.testing.assert_array_equal(rule(np.zeros(3), np.zeros(3)), np.zeros(3))


def test_opposite_models_have_no_mean_direction() -> None:
    np.testing.assert_array_equal(karcher(np.array([1.0, 0.0]), np.array([-1.0, 0.0])), [0.0, 0.0])


def test_geometric_median_of_a_triangle_is_its_fermat_point() -> None:
    """Of an equilateral triangle the centre; where an angle is 120 degrees or more, that corner."""
    corners = [np.array([np.cos(x), np.sin(x)]) for x in (0, 2 * np.pi / 3, 4 * np.pi / 3)]
    np.testing.assert_allclose(geometric_median(*corners), [0, 0], atol=1e-9)
    flat = [np.array(p) for p in ([0.0, 0.1], [-1.0, 0.0], [1.0, 0.0])]
    np.testing.assert_allclose(geometric_median(*flat), flat[0], atol=1e-4)


def test_geometric_median_hardly_sees_an_outlier(draw: Callable[[], F64]) -> None:
    points = [draw() for _ in range(4)]
    near, far = (geometric_median(*points, point) for point in (draw() * 1e3, draw() * 1e6))
    assert np.linalg.norm(near) < 20
    assert np.linalg.norm(far) < 20


def test_cart_by_the_papers_formula(draw: Callable[[], F64]) -> None:
    points = [draw() for _ in range(3)]
    centre = np.mean(points, axis=0)
    expected = centre.copy()
    for point in points:
        u, s, vt = np.linalg.svd(point - centre)
        expected += 0.5 * s[0] * np.outer(u[:, 0], vt[0]) + 0.5 * s[1] * np.outer(u[:, 1], vt[1])
    np.testing.assert_allclose(cart(*points, rank=0.5, scale=0.5), expected, atol=1e-12)
    np.testing.assert_allclose(cart(*points, rank=1.0, scale=1.0), centre, atol=1e-12)  # all of it sums to 0
    np.testing.assert_allclose(cart(points[0], rank=0.08, scale=1.0), points[0])
