"""Task vectors that do not say so, and a base in its finetuning's place."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clipmerge
from clipmerge.errors import RecipeError
from clipmerge.weights.digest import content_digest
from clipmerge.weights.input_checks import refuse_bare_vectors, refuse_swapped
from clipmerge.weights.parse import parse
from clipmerge.weights.plan import make_plan
from clipmerge.weights.verify import verify
from clipmerge.weights.weights import Weights, load, magmax, mean

Point = Callable[..., Weights]
Put = Callable[..., Path]
Arrays = Callable[..., dict[str, Any]]


def weights_like(seed: int, scale: float, start: dict[str, Any] | None = None) -> dict[str, Any]:
    draw = np.random.default_rng(seed)
    shapes = {f"visual.w{i}": (20, 30) for i in range(12)} | {"visual.bias": (30,)}
    noise = {name: draw.normal(scale=scale, size=shape) for name, shape in shapes.items()}
    return {n: (noise[n] + (0 if start is None else start[n])).astype(np.float32) for n in shapes}


@pytest.fixture
def files(put: Put) -> dict[str, Path]:
    """base, a finetuned model, its bare task vector, another pretrained model, and a narrower one."""
    base = weights_like(0, 0.03)
    tuned = weights_like(1, 0.01, base)  # a third of the base's norm: far more than finetuning moves
    held = {
        "base": base, "tuned": tuned, "tv": {n: tuned[n] - base[n] for n in base},
        "other": weights_like(2, 0.03), "small": {n: a * np.float32(0.4) for n, a in base.items()},
    }  # fmt: skip
    return {name: put(name, **tensors) for name, tensors in held.items()}


@pytest.mark.parametrize(
    "expression",
    ["base + 0.4*(tv - base)", "mean([base, tuned, tv])", "tv - base", "tv + 0.5*(base - tv)",
     "base + 0.4*magmax([tuned - base, tv - base])", "slerp([base, tv])"],
)  # fmt: skip
def test_a_bare_task_vector_is_not_a_model(files: dict[str, Path], expression: str) -> None:
    names = {name: load(path) for name, path in files.items() if name in expression}
    with pytest.raises(
        RecipeError, match=r"tv\.safetensors is a difference .* about 3\d% .* cosine -?0\.[01]"
    ) as refused:
        make_plan(parse(expression, names))
    assert "vector(NAME)" in (refused.value.hint or "")


def test_finetuned_unrelated_and_rescaled_models_are_models(files: dict[str, Path]) -> None:
    base, tuned, _, other, small = (load(path) for path in files.values())
    refuse_bare_vectors(mean([base, tuned, other, small]))


def test_a_name_says_that_it_is_a_vector(files: dict[str, Path], arrays: Arrays, tmp_path: Path) -> None:
    base, tuned, tv = (load(files[name]) for name in ("base", "tuned", "tv"))
    added = parse("base + 1*vector(tv)", {"base": base, "tv": tv})
    for name, array in arrays(added).items():
        np.testing.assert_allclose(array, arrays(tuned)[name], rtol=0, atol=1e-8)
    assert repr(added) == "base + vector(tv)"
    assert repr(base + load(files["tv"], vector=True)) == repr(added)
    assert repr(parse("vector(tv)/2", {"tv": load(files["tv"], vector=True)})) == "0.5*vector(tv)"
    (vector,) = clipmerge.load_all([files["tv"]], vectors=True)
    assert (added.terms, vector.kind()) == ((base + vector).terms, 0)
    largest = magmax([vector, tuned - base])
    assert repr(parse(repr(largest), {"base": base, "tuned": tuned, "tv": tv})) == repr(largest)
    written = added.save(tmp_path / "added.safetensors")
    assert verify(written).status == "verified"


@pytest.mark.parametrize(
    ("expression", "message"),
    [("vector(a + b)", "takes one checkpoint"), ("vector(a, b)", "takes one checkpoint"), ("vector()", "at least one"),
     ("vector(2)", "not the number 2"), ("vector(a, scale=1)", "no option 'scale'")],
)  # fmt: skip
def test_what_cannot_be_a_vector(point: Point, expression: str, message: str) -> None:
    names = {n: point(n) for n in "ab" if n in expression.removeprefix("vector")}
    with pytest.raises(RecipeError, match=message):
        parse(expression, names)


def test_a_task_vectors_file_is_one_already(point: Point) -> None:
    tv = point("tv", 0)
    assert repr(parse("vector(tv)", {"tv": tv})) == "tv"


def test_a_swapped_pair_is_told(put: Put) -> None:
    from clipmerge.weights.record import write_record

    base = put("base", **weights_like(0, 0.03))
    started = [{"file": "base.safetensors", "digest": content_digest(load(base).checkpoints[0])}]
    record = write_record({"format": 1, "training": {"base": started}})
    tuned = load(put("tuned", record, **weights_like(1, 0.03)))
    refuse_swapped(load(base), tuned)
    with pytest.raises(
        RecipeError, match=r"tuned\.safetensors was finetuned from .*base\.safetensors"
    ) as refused:
        refuse_swapped(tuned, load(base))
    assert "the base comes first" in (refused.value.hint or "")
    namesake = put("other/base", **weights_like(2, 0.03))  # only its name is the recorded one's
    refuse_swapped(tuned, load(namesake))
