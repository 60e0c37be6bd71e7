"""Rules that take task vectors and give a task vector."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from clipmerge.ops.vectors import breadcrumbs, consensus, dare, equal_factors, equalise, lines, magmax, ties


def test_magmax_takes_the_largest_magnitude_and_the_later_of_equals() -> None:
    vectors = [np.array(v) for v in ([1.0, -3.0, 2.0, 0.0], [-2.0, 1.0, -2.0, 0.0], [0.5, 2.0, 1.0, 0.0])]
    np.testing.assert_array_equal(magmax(*vectors), [-2.0, -3.0, -2.0, 0.0])


def test_magmax_by_an_independent_formula() -> None:
    rng = np.random.default_rng(1)
    stack = rng.standard_normal((5, 30))
    expected = stack[np.abs(stack).argmax(0), np.arange(30)]
    np.testing.assert_array_equal(magmax(*stack), expected)


def test_magmax_leaves_its_inputs_alone() -> None:
    first, second = np.array([1.0]), np.array([2.0])
    magmax(first, second)
    assert first[0] == 1.0


# -- TIES ------------------------------------------------------------------------------------------------


def test_ties_by_hand() -> None:
    """Half of four entries stay: 4 -3 | -2 5 | 3 -1 (largest two each); elected by the sums 1, -3+5, -2, 0."""
    a = np.array([4.0, -3.0, 1.0, 0.5])
    b = np.array([0.1, 5.0, -2.0, 0.2])
    c = np.array([-3.0, 0.0, 0.0, -1.0])
    #      sums:       1     2     -2    -1   → elected + + - -
    np.testing.assert_array_equal(ties(a, b, c, density=0.5), [4.0, 5.0, -2.0, -1.0])


def test_ties_averages_what_agrees_only() -> None:
    vectors = [np.array([v]) for v in (3.0, 1.0, -2.0)]
    np.testing.assert_array_equal(ties(*vectors, density=1.0), [2.0])


@pytest.mark.parametrize(("others", "expected"), [([1.0, 1.0], 2.0), ([-1.0, -1.0], -2.0)])
def test_ties_gives_cancelled_entries_the_sign_of_most(others: list[float], expected: float) -> None:
    """2 and -2 cancel: the majority of the other entries' signs decides."""
    a, b = np.array([2.0, *others]), np.array([-2.0, *others])
    np.testing.assert_array_equal(ties(a, b, density=1.0), [expected, *others])


def _ties_straight(vectors: list[np.ndarray], density: float) -> np.ndarray:
    """The paper's three steps on whole vectors, with a full sort."""
    stack = np.stack(vectors)
    count = max(1, int(density * stack.shape[1] + 1e-9))
    for row in stack:
        row[np.abs(row) < np.sort(np.abs(row))[-count]] = 0
    sign = np.sign(stack.sum(0))
    sign[sign == 0] = np.sign(sign.sum()) or -1
    agree = np.where(sign > 0, stack > 0, stack < 0)
    return (stack * agree).sum(0) / np.maximum(agree.sum(0), 1)


@given(
    st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 60), st.sampled_from([0.1, 0.2, 0.5, 1.0])
)
def test_ties_is_the_straight_version(seed: int, tasks: int, size: int, density: float) -> None:
    drawn = (
        np.random.default_rng(seed).integers(-9, 10, (tasks, size)).astype(np.float64)
    )  # many equal, many 0
    assume(all(row.any() for row in drawn))
    np.testing.assert_allclose(
        ties(*drawn, density=density), _ties_straight(list(drawn.copy()), density), rtol=1e-14
    )


def test_ties_of_one_is_its_trimming() -> None:
    np.testing.assert_array_equal(ties(np.array([3.0, -1.0, 2.0, 0.0]), density=0.5), [3.0, 0.0, 2.0, 0.0])


# -- DARE, Breadcrumbs, Consensus, LiNeS, equalise -----------------------------------------------------------


def test_dare_drops_a_share_and_scales_the_rest() -> None:
    ones = np.ones(20_000)
    made = dare(ones, name="x", p=0.9, seed=0)
    assert set(np.round(np.unique(made), 9)) == {0.0, 10.0}
    assert abs(np.mean(made != 0) - 0.1) < 0.01


def test_dare_draws_by_seed_and_name_apart_for_each_vector_in_any_order() -> None:
    a, b = np.full(2000, 1.0), np.full(2000, 3.0)
    both = dare(a, b, name="x", p=0.5, seed=0)
    np.testing.assert_array_equal(both, dare(b, a, name="x", p=0.5, seed=0))
    assert set(np.unique(both)) == {
        0.0,
        2.0,
        6.0,
        8.0,
    }  # each combination of drops: the draws are independent
    for other in (dare(a, b, name="y", p=0.5, seed=0), dare(a, b, name="x", p=0.5, seed=1)):
        assert (other != both).any()
    np.testing.assert_array_equal(dare(a, b, name="x", p=0.0, seed=0), a + b)


def test_breadcrumbs_by_hand() -> None:
    """Of ten entries the largest and the three smallest go."""
    vector = np.array([10.0, -9, 8, -7, 6, -5, 4, -3, 2, -1])
    made = breadcrumbs(vector, beta=0.1, gamma=0.3)
    np.testing.assert_array_equal(made, [0, -9, 8, -7, 6, -5, 4, 0, 0, 0])
    np.testing.assert_array_equal(breadcrumbs(vector, vector, beta=0.1, gamma=0.3), 2 * made)


@pytest.mark.parametrize("vector", [[2.0], [1.0, -3.0], [5.0, 5.0, 5.0, 5.0]])
def test_breadcrumbs_leave_something_of_small_and_even_tensors(vector: list[float]) -> None:
    assert breadcrumbs(np.array(vector), beta=0.1, gamma=0.8).any()


def test_consensus_by_hand() -> None:
    """|τ| > 0.5·|rest|, strictly: both tasks (kept), one, one at the border (dropped), opposite (both: kept)."""
    a, b = np.array([2.0, 4.0, 1.0, 2.0]), np.array([2.0, 1.0, 2.0, -2.0])
    np.testing.assert_array_equal(consensus(a, b, threshold=0.5, least=2), [4.0, 0.0, 0.0, 0.0])
    np.testing.assert_array_equal(consensus(a, b, threshold=0.5, least=1), [4.0, 5.0, 3.0, 0.0])
    np.testing.assert_array_equal(consensus(a, b, threshold=[0.1, 0.4], least=2), [4.0, 0.0, 3.0, 0.0])
    np.testing.assert_array_equal(consensus(a, threshold=0.6, least=2), a)


def test_lines_grows_with_depth() -> None:
    a, b = np.array([4.0]), np.array([8.0])
    depths = {"first": 0.0, "middle": 0.5, "last": 1.0}
    made = {name: float(lines(a, b, name=name, depths=depths)[0]) for name in (*depths, "outside")}
    assert made == {"first": 6.0, "middle": 9.0, "last": 12.0, "outside": 6.0}  # α = 1/2, β = 1 - α
    assert lines(a, name="last", depths=depths, alpha=0.25, beta=0.5)[0] == 3.0
    assert lines(a, name="last", depths=depths)[0] == 4.0  # one task: its vector
    assert lines(a, b, name="first", depths=depths, alpha=0.5, merged=np.array([3.0]))[0] == 1.5


def test_equalise_scales_to_the_median_norm() -> None:
    vectors = [np.array([1.0, 0.0]), np.array([0.0, 4.0]), np.array([2.0, 0.0])]
    np.testing.assert_allclose(equalise(*vectors), [4.0, 2.0])
    assert equal_factors([3.0, 0.0]) == [1.0, 1.0]
    assert equal_factors([0.0, 0.0]) == [1.0, 1.0]
