"""Coefficients are exact, and print as text that reads back."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipmerge.errors import RecipeError
from clipmerge.weights.coefficient import Coefficient, exact, number_text

NUMBERS = st.fractions(-5, 5, max_denominator=1000) | st.integers(-9, 9) | st.floats(-10, 10, width=32)
MAPS = st.dictionaries(st.sampled_from(["visual", "text", "*", "a.*"]), NUMBERS, max_size=3)
COEFFICIENTS = st.recursive(
    st.builds(Coefficient.of, NUMBERS | MAPS),
    lambda inner: st.builds(lambda a, b: a + b, inner, inner) | st.builds(lambda a, b: a * b, inner, inner),
    max_leaves=5,
)
NAMES = ["visual.proj", "text_projection", "a.b", "logit_scale"]


def test_a_float_counts_as_the_decimal_it_prints_as() -> None:
    assert exact(0.1) == Fraction(1, 10)
    assert exact(np.float32(0.5)) == Fraction(1, 2)
    assert exact(3) == 3
    assert exact(Fraction(2, 3)) == Fraction(2, 3)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_a_coefficient_is_finite(number: float) -> None:
    with pytest.raises(RecipeError, match="must be a finite number"):
        Coefficient.of(number)


def test_decimals_cancel_exactly() -> None:
    left = Coefficient.of(1) + Coefficient.of(-0.4) + Coefficient.of(-0.4)
    assert left.constant == Fraction(1, 5)
    assert not Coefficient.of(0.3) + Coefficient.of(-0.1) + Coefficient.of(-0.2)


def test_a_map_gives_each_name_the_first_pattern_that_matches() -> None:
    found = Coefficient.of({"visual.conv*": 0.25, "visual": 0.5, "*": 2})
    assert found.at("visual.conv1.weight") == Fraction(1, 4)
    assert found.at("visual.proj") == Fraction(1, 2)
    assert found.at("logit_scale") == 2
    assert found.constant is None
    assert found.patterns == ("*", "visual", "visual.conv*")


def test_a_name_that_no_pattern_matches_gets_nothing() -> None:
    assert Coefficient.of({"visual": 0.5}).at("logit_scale") == 0


def test_a_map_minus_itself_vanishes() -> None:
    rules = {"visual": 0.3, "*": 0.7}
    assert not Coefficient.of(rules) + Coefficient.of(-1) * Coefficient.of(rules)


@settings(deadline=None, max_examples=60)
@given(COEFFICIENTS, COEFFICIENTS, COEFFICIENTS)
def test_they_are_a_commutative_ring(a: Coefficient, b: Coefficient, c: Coefficient) -> None:
    assert a + b == b + a
    assert a * b == b * a
    assert (a + b) * c == a * c + b * c
    assert hash(a * b) == hash(b * a)


@settings(deadline=None, max_examples=60)
@given(COEFFICIENTS, COEFFICIENTS)
def test_values_follow_the_algebra(a: Coefficient, b: Coefficient) -> None:
    for name in NAMES:
        assert (a + b).at(name) == a.at(name) + b.at(name)
        assert (a * b).at(name) == a.at(name) * b.at(name)


@pytest.mark.parametrize(
    ("number", "text"),
    [(Fraction(3), "3"), (Fraction(1, 10), "0.1"), (Fraction(1, 3), "1/3"), (Fraction(-5, 4), "-1.25"),
     (Fraction(10**400 + 1, 3), f"{10**400 + 1}/3"), (Fraction("1e-7"), "1e-07")],
)  # fmt: skip
def test_a_number_prints_as_the_shortest_text_that_is_exactly_it(number: Fraction, text: str) -> None:
    assert number_text(number) == text
    assert Fraction(text) == number


@pytest.mark.parametrize(
    ("coefficient", "text"),
    [
        (Coefficient.of(0), "0"),
        (Coefficient.of({"visual": 0.5}), '{"visual": 0.5}'),
        (Coefficient.of(1) + Coefficient.of(-1) * Coefficient.of({"a": 0.5}), '(1 - {"a": 0.5})'),
        (Coefficient.of(0.5) * Coefficient.of({'q"\\': 1}), r'0.5*{"q\"\\": 1}'),
        (Coefficient.of({}), "{}"),
    ],
)
def test_how_it_prints(coefficient: Coefficient, text: str) -> None:
    assert str(coefficient) == text
