"""Encoders without their text tower over a whole base: what a task vector lacks is zero, a model must be whole."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clipmerge.errors import MismatchError
from clipmerge.weights.check import check, left_alone
from clipmerge.weights.look import compare
from clipmerge.weights.names import absent_parts
from clipmerge.weights.parse import parse
from clipmerge.weights.verify import verify
from clipmerge.weights.weights import Weights, interpolate, load, magmax, mean, slerp

Point = Callable[..., Weights]
Arrays = Callable[..., dict[str, Any]]

VISUAL = ("visual.conv1.weight", "visual.proj")
TEXT = ("transformer.resblocks.0.ln_1.weight", "token_embedding.weight", "text_projection")
FULL = (*VISUAL, *TEXT, "logit_scale")
LACKS = {
    "text tower": (*VISUAL, "logit_scale"),
    "text tower or logit scale": VISUAL,
    "text transformer": tuple(n for n in FULL if not n.startswith("transformer.")),  # task_vectors, wise-ft
    "image projection, text tower or logit scale": VISUAL[:1],  # Hugging Face's CLIPVisionModel
    "image tower": (*TEXT, "logit_scale"),
}


def numbers(arrays: dict[str, Any]) -> dict[str, float]:
    return {name: float(array.reshape(-1)[0]) for name, array in arrays.items()}


@pytest.fixture(params=LACKS)
def lack(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def models(point: Point, lack: str) -> dict[str, Weights]:
    """A whole model of ones, and partial checkpoints: v0 (1), va (2), vb (5)."""
    values = {"full": 1.0, "v0": 1.0, "va": 2.0, "vb": 5.0}
    names = {name: FULL if name == "full" else LACKS[lack] for name in values}
    return {name: point(name, **dict.fromkeys(names[name], value)) for name, value in values.items()}


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("full + 0.25*(va - v0)", 1.25),
        ("0.25*(va - v0) + full", 1.25),
        ("full + 0.25*(va - full)", 1.25),
        ("0.75*full + 0.25*va", 1.25),
        ("full + 1*(va - full)", 2),
        ("interpolate(full, va, 1)", 2),
        ("interpolate(full, va, 0)", 1),
        ("full + 0.5*((va - v0) + (vb - v0))", 3.5),
        ("full - 0.5*(va - v0)", 0.5),
        ("full + 0.5*magmax([va - v0, vb - v0])", 3),
        ("full + 0.5*magmax([va - full, vb - full])", 3),
        ("full + 0.5*(mean([va, vb]) - v0)", 2.25),
        ("full + 0.5*(slerp([va, vb], alpha=0) - v0)", 1.5),
        ('full + {"visual": 0.5, "*": 0.5}*(va - v0)', 1.5),
    ],
)
def test_what_a_vector_lacks_is_zero(
    models: dict[str, Weights], arrays: Arrays, lack: str, expression: str, value: float
) -> None:
    used = {name: weights for name, weights in models.items() if name in expression}
    merged = parse(expression, used)
    expected = {name: value if name in LACKS[lack] else 1.0 for name in FULL}
    assert numbers(arrays(merged)) == expected
    assert merged.kind() == 1
    assert merged.names == tuple(sorted(FULL))
    again = parse(repr(merged), {c.name: Weights.of(c) for c in merged.checkpoints})
    assert repr(again) == repr(merged)
    assert numbers(arrays(again)) == expected


def test_vectors_of_different_towers_add_up(point: Point, arrays: Arrays) -> None:
    full, tuned = (point(n, **dict.fromkeys(FULL, v)) for n, v in (("full", 1.0), ("tuned", 3.0)))
    v0, va = (point(n, **dict.fromkeys(VISUAL, v)) for n, v in (("v0", 1.0), ("va", 2.0)))
    for vector in ((va - v0) + (tuned - full), (tuned - full) + (va - v0)):
        expected = {name: 3.0 if name in VISUAL else 2.0 for name in FULL}
        assert numbers(arrays(vector)) == expected
        assert numbers(arrays(full + vector)) == {name: 1 + value for name, value in expected.items()}
    largest = magmax([va - v0, tuned - full])
    assert numbers(arrays(largest)) == dict.fromkeys(FULL, 2.0)


def test_the_difference_of_an_encoder_and_a_model_is_the_encoders(point: Point, arrays: Arrays) -> None:
    full, va = point("full", **dict.fromkeys(FULL, 1.0)), point("va", **dict.fromkeys(VISUAL, 3.0))
    assert numbers(arrays(va - full)) == dict.fromkeys(VISUAL, 2.0)
    assert numbers(arrays(full - va)) == dict.fromkeys(VISUAL, -2.0)


def test_a_saved_vector_of_one_tower_is_used_and_verified(
    put: Callable[..., Path], arrays: Arrays, tmp_path: Path
) -> None:
    full = load(put("full", **{name: np.float32([1]) for name in FULL}))
    va = load(put("va", **{name: np.float32([3]) for name in VISUAL}))
    vector = load((va - full).save(tmp_path / "tv.safetensors"))
    merged = (full + 0.5 * vector).save(tmp_path / "merged.safetensors")
    assert numbers(arrays(load(merged))) == {name: 2.0 if name in VISUAL else 1.0 for name in FULL}
    for file in (merged, tmp_path / "tv.safetensors"):
        assert verify(file).status == "verified"


def test_an_encoder_is_completed_from_a_base(models: dict[str, Weights], arrays: Arrays, lack: str) -> None:
    whole = models["va"].completed_from(models["full"])
    assert numbers(arrays(whole)) == {name: 2.0 if name in LACKS[lack] else 1.0 for name in FULL}
    assert left_alone(whole) == [f"va has no {lack}: kept as in full"]
    assert models["full"].completed_from(models["va"]) is models["full"]
    soup = mean([models["va"], models["vb"]]).completed_from(models["full"])
    assert numbers(arrays(soup)) == {name: 3.5 if name in LACKS[lack] else 1.0 for name in FULL}
    assert left_alone(soup) == [f"va, vb have no {lack}: kept as in full"]


def test_a_trained_head_stays_when_its_encoder_is_completed(point: Point, arrays: Arrays) -> None:
    head = "classification_head.weight"
    full = point("full", **dict.fromkeys(FULL, 1.0))
    tuned = point("tuned", **dict.fromkeys((*VISUAL, head), 2.0))
    whole = numbers(arrays(tuned.completed_from(full)))
    assert whole == {**dict.fromkeys(FULL, 1.0), **dict.fromkeys((*VISUAL, head), 2.0)}
    with pytest.raises(MismatchError, match="full has no classification head") as refused:
        check(interpolate(full, tuned, 0.5))
    assert "every checkpoint must have it, or none" in (refused.value.hint or "")


@pytest.mark.parametrize(
    "make",
    [
        lambda full, va: mean([full, va]),
        lambda full, va: mean([va, full]),
        lambda full, va: interpolate(va, full, 0.5),
        lambda full, va: slerp(full, va),
    ],
)
def test_a_model_must_be_whole(
    models: dict[str, Weights], lack: str, make: Callable[[Weights, Weights], Weights]
) -> None:
    with pytest.raises(MismatchError, match=f"va has no {lack}") as refused:
        check(make(models["full"], models["va"]))
    assert "a model must be whole" in (refused.value.hint or "")


@pytest.mark.parametrize("gone", [FULL[0], FULL[1], *TEXT[1:], "logit_scale"])
def test_a_tensor_missing_inside_a_tower_is_an_error(point: Point, gone: str) -> None:
    full = point("full", **dict.fromkeys(FULL, 1.0))
    a, b = (point(n, **{name: 1.0 for name in FULL if name != gone}) for n in "ab")
    for weights in (full + 0.5 * (a - b), interpolate(full, a, 0.5)):
        with pytest.raises(MismatchError, match=f"a lacks '{gone}'"):
            check(weights)
    with pytest.raises(MismatchError, match=f"a lacks '{gone}'"):
        a.completed_from(full)


@pytest.mark.parametrize(
    ("names", "missing", "parts"),
    [
        (["visual.a", "text.b", "logit_scale", "logit_bias"], ["text.b", "logit_scale", "logit_bias"],
         ("text", "other")),
        (["visual.a", "text.b", "logit_scale", "logit_bias"], ["text.b", "logit_bias"], None),  # a scale, no bias
        (["visual.a", "text.b", "text.transformer.c"], ["text.transformer.c"], None),  # CustomTextCLIP: all or none
        (["visual.a", "transformer.c", "ln_final.weight"], ["transformer.c"], ("transformer.*",)),
        (["visual.a", "transformer.c", "transformer.d", "ln_final.weight"], ["transformer.c"], None),
        (["visual.a", "visual.proj", "text_projection"], ["visual.proj"], None),  # with its text tower
        (["visual.a", "ln_final.weight", "text_projection"], ["visual.a", "text_projection"],
         ("visual", "text_projection")),  # CLIPTextModel
        (["visual.a", "ln_final.weight", "text_projection"], ["text_projection"], None),
        (["visual.a", "logit_scale"], ["logit_scale"], None),
        (["visual.a", "classification_head.weight", "classification_head.bias"],
         ["classification_head.weight", "classification_head.bias"], ("head",)),
        (["visual.a", "classification_head.weight", "classification_head.bias"], ["classification_head.bias"], None),
    ],
)  # fmt: skip
def test_which_names_are_whole_towers(
    names: list[str], missing: list[str], parts: tuple[str, ...] | None
) -> None:
    assert absent_parts(set(missing), names) == parts


def test_an_encoder_is_compared_by_the_towers_that_it_has(models: dict[str, Weights], lack: str) -> None:
    held = len(LACKS[lack])
    for a, b in (("full", "va"), ("va", "full")):
        found = compare(models[a], models[b])
        assert (found.whole.tensors, found.whole.largest) == (held, 1.0)
        assert set(found.differing) == set(LACKS[lack])
    cosine = compare(models["va"], models["vb"], models["full"]).whole
    assert (cosine.tensors, cosine.cosine) == (held, pytest.approx(1.0))
