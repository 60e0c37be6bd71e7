"""The table of nonlinear methods, and what it refuses."""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from clipmerge.errors import RecipeError
from clipmerge.weights import weights as face
from clipmerge.weights.methods import METHODS, apply
from clipmerge.weights.weights import Weights

Point = Callable[..., Weights]


def test_the_table_says_what_the_functions_take() -> None:
    for name, method in METHODS.items():
        parameters = inspect.signature(method.function).parameters.values()
        options = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
        assert (name, options) == (method.name, set(method.options))
        assert method.function.__doc__


def test_points_give_a_point_and_vectors_a_vector(point: Point) -> None:
    a, b = point("a"), point("b")
    assert apply("slerp", [a, b]).kind() == 1
    assert apply("magmax", [a - b, b - a]).kind() == 0
    assert (a + 0.5 * apply("magmax", [a - b, b - a])).kind() == 1


@pytest.mark.parametrize(
    ("name", "count", "options", "message", "hint"),
    [
        ("slrp", 2, {}, "there is no method 'slrp'", "did you mean slerp?"),
        ("qqq", 2, {}, "there is no method 'qqq'", "known: "),
        ("slerp", 3, {}, "slerp takes 2 operands, not 3", None),
        ("model_stock", 2, {}, "model_stock takes at least 3 operands, not 2", None),
        ("slerp", 2, {"alpa": 1.0}, "slerp has no option 'alpa'", "did you mean alpha?"),
        ("magmax", 2, {}, "magmax takes task vectors (total 0), such as a - base, not m0", None),
    ],
)
def test_what_is_refused(
    point: Point, name: str, count: int, options: dict[str, Any], message: str, hint: str | None
) -> None:
    with pytest.raises(RecipeError) as refused:
        apply(name, [point(f"m{i}") for i in range(count)], **options)
    assert refused.value.message == message
    assert (refused.value.hint or "").startswith(hint or "")


def test_vectors_are_no_points(point: Point) -> None:
    with pytest.raises(RecipeError, match=r"slerp takes models \(total 1\), not a - b"):
        apply("slerp", [point("a") - point("b"), point("c")])


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_method_takes_tensors_of_any_rank(name: str, point: Point, arrays: Callable[..., Any]) -> None:
    """Every CLIP has a scalar, `logit_scale`."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"logit_scale": (), "w": (3, 4), "b": (4,), "none": (0, 2)}
    made = [point(n, **{k: rng.standard_normal(s).astype("f4") for k, s in shapes.items()}) for n in "abc"]
    base, *others = made
    method = METHODS[name]
    operands = made if method.takes == "points" else [other - base for other in others]
    result = apply(name, operands[: method.operands[1]])
    got = arrays(result if method.gives else base + 0.5 * result)
    assert {key: value.shape for key, value in got.items()} == shapes
    assert all(np.isfinite(value).all() for value in got.values())


def test_each_method_is_a_function(point: Point) -> None:
    """Operands one by one or in a list, options by place or by name; the documentation is the rule's own."""
    a, b, base = (point(n) for n in ("a", "b", "base"))
    texts = {
        repr(made)
        for made in (face.slerp(a, b, 0.3), face.slerp([a, b], alpha=0.3), apply("slerp", [a, b], alpha=0.3))
    }
    assert texts == {"slerp([a, b], alpha=0.3)"}
    assert repr(face.model_stock([base, a, b])) == "model_stock([base, a, b])"
    assert isinstance(face.magmax([a - base, b - base]), Weights)
    assert {getattr(face, name).__doc__ for name in METHODS} == {m.function.__doc__ for m in METHODS.values()}
    with pytest.raises(RecipeError, match="slerp takes 1 options, not 2"):
        face.slerp(a, b, 0.3, 0.4)
    with pytest.raises(AttributeError):
        _ = face.slurp
