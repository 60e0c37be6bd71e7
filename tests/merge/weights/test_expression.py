"""The algebra of weights: laws, totals, what is base, what cannot be written."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import clipmerge
from clipmerge.errors import CheckpointError, MismatchError, RecipeError
from clipmerge.weights.weights import Weights, from_state_dict, interpolate, load, load_all, mean

Point = Callable[..., Weights]
Arrays = Callable[..., dict[str, Any]]

TENSORS = hnp.arrays(np.float32, (7,), elements=st.floats(-100, 100, width=32))
COEFFICIENTS = st.decimals(-2, 2, places=3).map(float)


def bits(arrays: dict[str, Any]) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in arrays.items()}


@settings(deadline=None, max_examples=50)
@given(TENSORS, TENSORS)
def test_the_ends_of_interpolation_are_the_models(point: Point, arrays: Arrays, x: Any, y: Any) -> None:
    a, b = point("a", x=x), point("b", x=y)
    assert bits(arrays(interpolate(a, b, 0))) == {"x": x.tobytes()}
    assert bits(arrays(interpolate(a, b, 1))) == {"x": y.tobytes()}
    assert bits(arrays(interpolate(a, b, 0.3))) == bits(arrays(interpolate(b, a, 0.7)))


@settings(deadline=None, max_examples=50)
@given(TENSORS, st.integers(1, 9))
def test_the_mean_of_one_model_is_that_model(point: Point, arrays: Arrays, x: Any, count: int) -> None:
    """Also when it was loaded several times: x + x + x divided by 3 is x, bit for bit."""
    copies = [point(f"a{i}", x=x) for i in range(count)]
    assert bits(arrays(mean(copies))) == {"x": x.tobytes()}
    assert mean([copies[0]] * count).terms == copies[0].terms


@settings(deadline=None, max_examples=50)
@given(st.lists(TENSORS, min_size=2, max_size=5), st.randoms())
def test_the_order_of_a_soup_does_not_matter(
    point: Point, arrays: Arrays, xs: list[Any], random: Any
) -> None:
    models = [point(f"m{i}", x=x) for i, x in enumerate(xs)]
    shuffled = list(models)
    random.shuffle(shuffled)
    assert bits(arrays(mean(models))) == bits(arrays(mean(shuffled)))
    assert repr(mean(models)) == repr(mean(shuffled))


@settings(deadline=None, max_examples=50)
@given(TENSORS, TENSORS, COEFFICIENTS)
def test_base_plus_difference_is_the_model(point: Point, arrays: Arrays, x: Any, y: Any, c: float) -> None:
    base, a = point("base", x=x), point("a", x=y)
    assert (base + (a - base)).terms == a.terms
    assert bits(arrays(base + c * (a - base))) == bits(arrays((1 - Fraction(str(c))) * base + c * a))
    assert (base + c * (a - base) - c * (a - base)).terms == base.terms


@settings(deadline=None, max_examples=50)
@given(TENSORS, TENSORS, TENSORS)
def test_a_merge_is_the_sum_in_float64_rounded_to_float32(
    point: Point, arrays: Arrays, x: Any, y: Any, z: Any
) -> None:
    """Independent formula: rational arithmetic. Half a unit of float32, and what float64 loses of the inputs."""
    merged = arrays(mean([point("a", x=x), point("b", x=y), point("c", x=z)]))["x"]
    for got, *inputs in zip(merged, x, y, z, strict=True):
        exact = sum(Fraction(float(number)) for number in inputs) / 3
        unit = float(np.spacing(np.float32(abs(float(exact)))))
        assert abs(float(Fraction(float(got)) - exact)) <= unit * 0.500001 + 2.0**-51 * max(map(abs, inputs))


def test_expressions_collapse_to_one_coefficient_each(point: Point) -> None:
    zs, cars, dtd = point("zs"), point("cars"), point("dtd")
    both = zs + 0.4 * ((cars - zs) + (dtd - zs))
    (zs_leaf,), (cars_leaf,), (dtd_leaf,) = zs.terms, cars.terms, dtd.terms
    found = {leaf: c.constant for leaf, c in both.terms.items()}
    assert found == {zs_leaf: Fraction(1, 5), cars_leaf: Fraction(2, 5), dtd_leaf: Fraction(2, 5)}


@pytest.mark.parametrize(
    ("make", "total"),
    [
        (lambda a, b: a, 1), (lambda a, b: a - b, 0), (lambda a, b: mean([a, b]), 1), (lambda a, b: a + b, 2),
        (lambda a, b: -a, -1), (lambda a, b: a / 2, Fraction(1, 2)), (lambda a, b: a + 0.3 * (b - a), 1),
        (lambda a, b: a * {"*": 0.5} + {"*": 0.5} * b, 1),
    ],
)  # fmt: skip
def test_totals(point: Point, make: Callable[[Weights, Weights], Weights], total: Any) -> None:
    assert make(point("a"), point("b")).total == total


def test_a_task_vectors_file_counts_as_a_vector(point: Point) -> None:
    base, vector = point("base"), point("tv", 0)
    assert (base + 0.4 * vector).total == 1
    assert (3 * vector).kind() == 0


@pytest.mark.parametrize(
    ("make", "message", "hint"),
    [
        (lambda a, b: a + b, "total is 2: neither a model", "did you mean mean([...])?"),
        (lambda a, b: 0.5 * a, "total is 0.5: neither", "did you mean base + scale*(a - base)?"),
        (lambda a, b: a - a, "every coefficient is zero", None),
    ],
)
def test_what_is_neither_model_nor_vector_is_refused(
    point: Point, make: Callable[[Weights, Weights], Weights], message: str, hint: str | None
) -> None:
    with pytest.raises(RecipeError, match=message) as refused:
        make(point("a"), point("b")).kind()
    assert refused.value.hint == hint


def test_totals_that_differ_between_tensors_are_refused_with_both_names(point: Point) -> None:
    a = point("a", **{"visual.x": 1.0, "logit_scale": 1.0})
    with pytest.raises(RecipeError, match=r"total is 1 for 'logit_scale' but 1\.5 for 'visual\.x'"):
        _ = (a + {"visual": 0.5} * a).total


def test_coefficients_that_sum_to_one_up_to_rounding_are_a_model(point: Point) -> None:
    thirds = [0.333333, 0.333333, 0.333333]
    total = thirds[0] * point("a") + thirds[1] * point("b") + thirds[2] * point("c")
    assert total.kind() == 1


def test_a_pattern_leaves_the_rest_at_the_base(point: Point, arrays: Arrays) -> None:
    a = point("a", **{"visual.x": [1.0], "text.x": [1.0]})
    b = point("b", **{"visual.x": [3.0], "text.x": [3.0]})
    merged = arrays(interpolate(a, b, {"visual": 0.5}))
    assert merged["visual.x"] == [2.0]
    assert merged["text.x"] == [1.0]


def test_the_base_is_the_first_written_and_a_mean_has_none(point: Point) -> None:
    a, b = point("a"), point("b")
    (leaf_a,), (leaf_b,) = a.terms, b.terms
    assert (a + b).base is leaf_a
    assert (b - a).base is leaf_b
    assert interpolate(b, a, 0.5).base is leaf_b
    assert mean([a, b]).base is None
    assert (a - a + b).base is leaf_b


@pytest.mark.parametrize("wrong", [lambda a: a * a, lambda a: a / 0, lambda a: mean([])])
def test_meaningless_arithmetic_is_refused(point: Point, wrong: Callable[[Weights], Weights]) -> None:
    with pytest.raises(RecipeError):
        wrong(point("a"))


def test_other_types_are_python_type_errors(point: Point) -> None:
    for wrong in (lambda a: a + 1, lambda a: a - "b"):
        with pytest.raises(TypeError):
            wrong(point("a"))


def test_one_file_loaded_twice_is_one_checkpoint(put: Callable[..., Path]) -> None:
    path = put("a", x=np.ones(3, np.float32))
    assert load(path).checkpoints == load(path).checkpoints
    assert (load(path) - load(path)).terms == {}
    assert load(path, "other").checkpoints != load(path).checkpoints


def test_load_all_gives_distinct_names_whatever_the_order(put: Callable[..., Path]) -> None:
    one, two = put("p/model.safetensors", x=np.ones(1)), put("q/model.safetensors", x=np.ones(1))
    assert [repr(w) for w in load_all([one, two])] == ["model", "model_2"]
    assert [repr(w) for w in load_all([two, one])] == ["model_2", "model"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nothing\.safetensors does not exist"):
        load(tmp_path / "nothing.safetensors")


def test_models_that_differ_are_not_mixed_unless_one_is_named(point: Point, tmp_path: Path) -> None:
    a = point("a", 1, {"model": {"name": "ViT-B-32", "config": {"embed_dim": 512}}})
    b = point(
        "b", 1, {"model": {"name": "ViT-B-32-quickgelu", "config": {"embed_dim": 512, "quick_gelu": True}}}
    )
    with pytest.raises(
        MismatchError, match=r"b was made for ViT-B-32-quickgelu, a for ViT-B-32: .* quick_gelu"
    ):
        _ = mean([a, b]).model
    with pytest.raises(MismatchError, match="b was made for"):
        mean([a, b]).save(tmp_path / "out.safetensors")
    chosen = {"name": "ViT-B-32", "config": {"embed_dim": 512}}
    saved = load(mean([a, b]).save(tmp_path / "out.safetensors", metadata={"model": chosen}))
    assert saved.model == chosen


def test_the_recorded_model_is_the_bases_and_never_the_first_listed(point: Point) -> None:
    records = [{"name": n, "config": {"embed_dim": 4}} for n in ("one", "two")]
    a, b = (point(n, 1, {"model": record}) for n, record in zip("ab", records, strict=True))
    assert mean([a, b]).model == mean([b, a]).model == records[0]
    assert interpolate(b, a, 0.5).model == records[1]
    assert mean([point("c"), point("d")]).model is None


def test_from_state_dict_shares_what_it_can_and_saves_what_it_holds(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    tensors = {"a": torch.arange(6.0).reshape(2, 3).t(), "b": torch.tensor(2), "c": torch.ones(3).bfloat16()}
    path = from_state_dict(tensors).save(tmp_path / "out.safetensors")
    back = load_file(path)
    assert all(torch.equal(back[k], tensors[k]) and back[k].dtype == tensors[k].dtype for k in tensors)


def test_the_package_offers_the_algebra() -> None:
    assert clipmerge.mean is mean
    assert clipmerge.interpolate is interpolate
