"""An expression → what each tensor is made of."""

from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest

from clipmerge.errors import RecipeError
from clipmerge.weights.coefficient import Coefficient
from clipmerge.weights.plan import float_dtype, make_plan
from clipmerge.weights.weights import Weights, interpolate, mean

Point = Callable[..., Weights]


def factors(weights: Weights, name: str = "x") -> tuple[dict[str, float], float]:
    step = make_plan(weights).steps[name]
    return {leaf.name: f for f, leaf in step.terms}, step.divisor


def test_small_denominators_become_integers_and_one_division(point: Point) -> None:
    a, b, c = (point(n, x=[float(i)]) for i, n in enumerate("abc"))
    assert factors(mean([a, b, c])) == ({"a": 1.0, "b": 1.0, "c": 1.0}, 3.0)
    assert factors(interpolate(a, b, 0.4)) == ({"a": 3.0, "b": 2.0}, 5.0)
    assert factors(a - 0.6 * (b - a)) == ({"a": 8.0, "b": -3.0}, 5.0)


def test_long_decimals_stay_floats(point: Point) -> None:
    a, b = point("a"), point("b")
    assert factors(interpolate(a, b, 0.123456789)) == ({"a": 0.876543211, "b": 0.123456789}, 1.0)


def test_what_a_tensor_does_not_need_is_not_read(point: Point) -> None:
    a, b = (point(n, **{"visual.x": [1.0, 2.0], "text.x": [1.0]}) for n in "ab")
    plan = make_plan(interpolate(a, b, {"visual": 1}))
    assert [s.name for s in plan.steps["visual.x"].checkpoints] == ["b"]
    assert [s.name for s in plan.steps["text.x"].checkpoints] == ["a"]
    assert (plan.read_bytes, plan.written_bytes) == (12, 12)
    assert make_plan(mean([a, b]), dtype="F16").written_bytes == 6


def test_the_order_of_the_sum_depends_on_contents_alone(point: Point) -> None:
    models = [point(name, x=[number]) for name, number in (("a", 1.0), ("b", 3.0), ("c", 2.0))]
    renamed = [point(name, x=[number]) for name, number in (("z", 1.0), ("y", 3.0), ("x", 2.0))]
    orders = set()
    for family in (models, renamed):
        for order in permutations(family):
            step = make_plan(mean(order)).steps["x"]
            orders.add(tuple(float(t.extents[0].source.view(np.float32)[0]) for _, t in step.inputs))  # type: ignore[union-attr]
    assert len(orders) == 1


def test_equal_contents_with_different_coefficients_have_one_order_too(point: Point) -> None:
    copies = [point(n, x=[5.0]) for n in "abc"]
    numbers = (0.123456789, 0.3, 0.576543211)
    seen = set()
    for order in permutations(zip(numbers, copies, strict=True)):
        total = Weights({}, None)
        for number, weights in order:
            total = total + number * weights
        seen.add(tuple(f for f, _ in make_plan(Weights(total.terms, None)).steps["x"].terms))
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("text", "dtype"),
    [("fp16", "F16"), ("F16", "F16"), ("half", "F16"), ("torch.float16", "F16"), ("bf16", "BF16"),
     ("BFloat16", "BF16"), ("fp32", "F32"), ("float", "F32"), ("f64", "F64"), ("f8_e4m3", "F8_E4M3"),
     ("float8_e5m2", "F8_E5M2"), (None, None)],
)  # fmt: skip
def test_dtypes_by_their_usual_names(text: str | None, dtype: str | None) -> None:
    assert float_dtype(text) == dtype


def test_an_unknown_dtype_is_refused_with_the_nearest(point: Point) -> None:
    with pytest.raises(RecipeError, match="'fp166' is not a float dtype") as refused:
        make_plan(point("a"), dtype="fp166")
    assert refused.value.hint == "did you mean fp16?"
    with pytest.raises(RecipeError, match="'I64' is not a float dtype"):
        make_plan(point("a"), dtype="I64")


def test_a_coefficient_beyond_float64_is_refused(point: Point) -> None:
    a, b = point("a"), point("b")
    huge = 1e300 * (1e300 * (a - b))
    with pytest.raises(RecipeError, match="larger than float64 holds"):
        make_plan(huge)


def test_the_dtype_follows_the_base_tensor_by_tensor(point: Point) -> None:
    base = point("base", x=("BF16", [1.0]), y=[1.0])
    other = point("other", x=[1.0], y=("F16", [1.0]))
    found = {name: step.dtype for name, step in make_plan(interpolate(base, other, 0.5)).steps.items()}
    assert found == {"x": "BF16", "y": "F32"}
    assert {s.dtype for s in make_plan(interpolate(base, other, 0.5), dtype="fp16").steps.values()} == {"F16"}


def test_integers_agree_and_step_counters_follow_the_base_or_the_longest(point: Point) -> None:
    def make(name: str, steps: int) -> Weights:
        return point(name, **{"bn.num_batches_tracked": np.array(steps), "ids": np.arange(3), "x": [1.0]})

    a, b = make("a", 3), make("b", 5)
    assert make_plan(mean([a, b])).steps["bn.num_batches_tracked"].kind == "largest"
    based = make_plan(interpolate(a, b, 0.5)).steps
    assert [s.name for s in based["bn.num_batches_tracked"].checkpoints] == ["a"]
    assert based["ids"].kind == "agree"


def test_nonlinear_leaves_make_computed_steps(point: Point) -> None:
    from clipmerge.weights.methods import apply

    a, b = point("a", x=[1.0, 2.0]), point("b", x=[1.0, 0.0])
    plan = make_plan(a + 0.5 * (apply("slerp", [a, b]) - a))
    assert plan.steps["x"].has_methods
    assert [c for c, _ in plan.steps["x"].terms].count(0.5) == 2
    assert plan.read_bytes == 16


def test_coefficients_are_evaluated_per_tensor() -> None:
    assert Coefficient.of({"a": 1}).at("b") == 0
