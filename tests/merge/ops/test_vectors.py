"""Rules that take task vectors and give a task vector."""

import numpy as np

from clipmerge.ops.vectors import magmax


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
