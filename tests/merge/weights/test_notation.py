"""Weights → text: the same for the same sum, and the same text works in Python."""

from collections.abc import Callable

import pytest

from clipmerge.weights.methods import apply
from clipmerge.weights.notation import identifiers_of
from clipmerge.weights.weights import Weights, interpolate, mean

Point = Callable[..., Weights]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda a, b, c: a, "a"),
        (lambda a, b, c: mean([c, a, b]), "mean([a, b, c])"),
        (lambda a, b, c: mean([a, a, b]), "sum([2/3*a, 1/3*b])"),
        (lambda a, b, c: a + 0.4 * (b - a), "0.6*a + 0.4*b"),
        (lambda a, b, c: b + 0.5 * (a - b), "0.5*b + 0.5*a"),
        (lambda a, b, c: a - 0.6 * (b - a), "1.6*a - 0.6*b"),
        (lambda a, b, c: -a + b, "-a + b"),
        (lambda a, b, c: (b + c) / 3 + a / 3, "1/3*b + 1/3*a + 1/3*c"),
        (lambda a, b, c: mean([a, b]) * 0 + c, "c"),
        (lambda a, b, c: a - a, "0"),
        (lambda a, b, c: interpolate(a, b, {"visual": 0.5}), '(1 - {"visual": 0.5})*a + {"visual": 0.5}*b'),
        (lambda a, b, c: apply("slerp", [a, mean([c, b])], alpha=0.1), "slerp([a, mean([b, c])], alpha=0.1)"),
        (lambda a, b, c: a + apply("magmax", [b - a, c - a]), "a + magmax([b - a, c - a])"),
        (
            lambda a, b, c: a + 0.5 * apply("ties", [b - a], equalise=True),
            'a + 0.5*ties([b - a], density=0.2, scope="model", equalise=True)',
        ),
        (
            lambda a, b, c: a + apply("svc", [b - a, c - a], merged=apply("tsv", [b - a, c - a]), alpha=1),
            "a + svc([b - a, c - a], merged=tsv([b - a, c - a]), alpha=1.0)",
        ),
        (
            lambda a, b, c: apply("consensus", [b - a, c - a], threshold=(0.2, 0.4)),
            "consensus([b - a, c - a], threshold=[0.2, 0.4], least=2)",
        ),
    ],
)
def test_how_expressions_print(point: Point, make: Callable[..., Weights], text: str) -> None:
    assert repr(make(point("a"), point("b"), point("c"))) == text


def test_names_that_clash_or_are_no_identifiers_are_made_distinct(point: Point) -> None:
    weights = mean([point("ft"), point("ft"), point("1e-5"), point("lambda"), point("méan")])
    assert sorted(identifiers_of(weights).values()) == ["ft", "ft_2", "m_an", "w_1e_5", "w_lambda"]


def test_the_text_is_python(point: Point) -> None:
    a, b = point("a"), point("b")
    for weights in (mean([a, b]), a + 0.4 * (b - a), a - 3 * b):
        again = eval(repr(weights), {"a": a, "b": b, "mean": mean})
        assert again.terms == weights.terms
