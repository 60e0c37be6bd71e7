"""Do checkpoints fit together? Found from headers, all problems at once."""

from collections.abc import Callable
from typing import Any

import pytest

from clipmerge.errors import MismatchError, RecipeError
from clipmerge.weights.check import check
from clipmerge.weights.methods import apply
from clipmerge.weights.weights import Weights, interpolate, mean

Point = Callable[..., Weights]


def refusal(weights: Weights, **options: Any) -> MismatchError | RecipeError:
    with pytest.raises((MismatchError, RecipeError)) as refused:
        check(weights, **options)
    return refused.value


def test_every_problem_is_told_at_once(point: Point) -> None:
    a = point("a", **{"text.weight": [1.0], "visual.proj": [[1.0]], "n": [1.0]})
    b = point("b", **{"text.wieght": [1.0], "visual.proj": [1.0, 2.0], "n": [1.0]})
    found = refusal(interpolate(a, b, 0.5))
    assert found.message.splitlines() == [
        "the checkpoints do not fit together:",
        "  b lacks 'text.weight' (it has 'text.wieght')",
        "  b has 'text.wieght', which a lacks",
        "  'visual.proj' is [1, 1] in a and [2] in b",
    ]
    assert "one architecture" in (found.hint or "")


def test_many_problems_are_counted(point: Point) -> None:
    a = point("a", x=[1.0], **{f"gone{i:02}": [1.0] for i in range(14)})
    assert refusal(mean([a, point("b", x=[1.0])])).message.splitlines()[-1] == "  … and 4 more"


def test_a_head_that_only_some_have_is_explained(point: Point) -> None:
    a = point("a", x=[1.0], **{"classification_head.weight": [[1.0]]})
    assert "every checkpoint must have it, or none" in (refusal(mean([a, point("b", x=[1.0])])).hint or "")


def test_a_mean_of_different_dtypes_needs_a_dtype(point: Point) -> None:
    a, b = point("a", x=("F16", [1.0])), point("b", x=("BF16", [1.0]))
    found = refusal(mean([a, b]))
    assert "'x' is F16 in a and BF16 in b" in found.message
    assert "choose one: --dtype fp32" in (found.hint or "")
    check(mean([a, b]), dtype="F32")
    check(interpolate(a, b, 0.5))  # the base says


def test_floats_and_integers_do_not_mix(point: Point) -> None:
    import numpy as np

    a, b = point("a", x=[1.0]), point("b", x=np.array([1]))
    assert "'x' is F32 in a and I64 in b" in refusal(interpolate(a, b, 0.5)).message


@pytest.mark.parametrize(
    ("pattern", "hint"), [("visual.prj", "did you mean visual.proj?"), ("zzzzzz", "patterns are globs")]
)
def test_a_pattern_that_matches_nothing_is_a_mistake(point: Point, pattern: str, hint: str) -> None:
    a, b = (point(n, **{"visual.proj": [1.0]}) for n in "ab")
    found = refusal(interpolate(a, b, {pattern: 0.5}))
    assert found.message == f"the pattern {pattern!r} matches no tensor"
    assert hint in (found.hint or "")


def test_patterns_and_shapes_inside_methods_are_checked_too(point: Point) -> None:
    a, b = point("a", x=[1.0]), point("b", x=[1.0])
    assert "'nope'" in refusal(apply("slerp", [a, interpolate(a, b, {"nope": 0.5})])).message
    assert "[2]" in refusal(apply("slerp", [a, point("c", x=[1.0, 2.0])])).message


def test_totals_are_checked(point: Point) -> None:
    a, b = point("a", x=[1.0]), point("b", x=[1.0])
    assert "total is 2" in refusal(a + b).message


def test_whose_dtypes_count(point: Point) -> None:
    a, b, c = point("a"), point("b"), point("c")
    assert interpolate(b, a, 0.5).reference.name == "b"
    assert mean([c, b]).reference.name == "b"  # the first by name, not by order
    assert apply("slerp", [mean([c, b]), a]).reference.name == "b"
