"""What a written file says about how it was made."""

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import clipmerge
from clipmerge.checkpoint.tensors import Checkpoint, Extent, Tensor
from clipmerge.errors import ClipmergeError, RecipeError
from clipmerge.weights.coefficient import Coefficient
from clipmerge.weights.digest import content_digest
from clipmerge.weights.look import inspect
from clipmerge.weights.provenance import GENERATIONS, file_metadata, history, is_original, parents_of
from clipmerge.weights.record import read_record, write_record
from clipmerge.weights.weights import Weights, interpolate, load, mean

Point = Callable[..., Weights]
Put = Callable[..., Path]


def test_the_record_of_a_merge(put: Put) -> None:
    a, b = load(put("a", x=np.float32([1])), "a"), load(put("b", x=np.float32([2])), "b")
    digests = {c: content_digest(c) for w in (a, b) for c in w.checkpoints}
    scores = {"scores": {"val": {"value": 0.5}}}
    metadata = file_metadata(interpolate(a, b, 0.5), dtype="F16", extra=scores, digests=digests)
    assert metadata["format"] == "pt"
    assert json.loads(metadata["clipmerge"]) == {
        "format": 1,
        "version": clipmerge.__version__,
        "notation": "0.5*a + 0.5*b",
        "total": 1,
        "dtype": "F16",
        "parents": {
            "a": {"file": "a.safetensors", "digest": content_digest(a.checkpoints[0])},
            "b": {"file": "b.safetensors", "digest": content_digest(b.checkpoints[0])},
        },
        "scores": {"val": {"value": 0.5}},
    }


def test_it_depends_on_neither_order_nor_folder(put: Put) -> None:
    files = [put(f"{n}/{n}", x=np.float32([i])) for i, n in enumerate("abc")]
    models = [load(file) for file in files]
    assert file_metadata(mean(models)) == file_metadata(mean(models[::-1]))
    assert str(files[0].parent) not in json.dumps(file_metadata(mean(models)))


def test_a_vector_and_the_model_are_recorded(point: Point) -> None:
    model = {"name": "tiny", "config": {"embed_dim": 4}, "preprocess": {"size": 16}}
    a, b = (point(n, 1, {"model": model}) for n in "ab")
    record = read_record(file_metadata(a - b))
    assert (record["total"], record["notation"], record["dtype"]) == (0, "a - b", "base")
    assert record["model"] == model


def test_without_digests_none_is_computed(point: Point) -> None:
    record = read_record(file_metadata(mean([point("a"), point("b")])))
    assert record["parents"] == {"a": {"file": None}, "b": {"file": None}}


def test_the_history_goes_through_generations(tmp_path: Path, put: Put) -> None:
    trained = {"format": 1, "training": {"lr": 1e-5}}
    weights = load(put("ft", write_record(trained), x=np.float32([1.0])))
    for generation in range(GENERATIONS + 3):
        weights = load(interpolate(weights, weights * 1, 0).save(tmp_path / f"g{generation}.safetensors"))
    depth, made = 0, read_record(weights.checkpoints[0].metadata)
    while made and parents_of(made):
        made, depth = parents_of(made)[0].made, depth + 1
    assert depth == GENERATIONS + 1


def quick(layout: str, **extra: object) -> Weights:
    raw = np.zeros(4, np.uint8)
    checkpoint = Checkpoint("w", {"x": Tensor("F32", (1,), (Extent(raw, 0, 4),))}, {}, layout, None, extra)
    return Weights({checkpoint: Coefficient.of(1)}, checkpoint)


def test_quick_gelu_is_remembered_through_generations(tmp_path: Path) -> None:
    """No tensor tells it, and a model built without it gives other numbers."""
    model = {"name": "ViT-B-32", "config": {"embed_dim": 512}, "preprocess": {}}
    weights = quick("openai")
    for generation in range(2):
        weights = load(weights.save(tmp_path / f"{generation}.safetensors"))
        assert weights.record["quick_gelu"] is True
    tagged = load(quick("open_clip", quick_gelu=True, model=model).save(tmp_path / "t.safetensors"))
    assert tagged.model == {**model, "config": {"embed_dim": 512, "quick_gelu": True}}
    assert "quick_gelu" not in read_record(file_metadata(quick("open_clip")))


def test_a_published_parent_is_recorded_by_its_reference() -> None:
    record = read_record(file_metadata(quick("open_clip", reference="hf-hub:org/name")))
    assert record["parents"] == {"w": {"file": "hf-hub:org/name"}}


def test_training_is_kept_and_notes_of_weights_in_memory_are_not() -> None:
    parents = {"model": {"file": None, "digest": "ab"}}
    original = {"notation": "model", "parents": parents, "training": {"lr": 1}, "scores": {"val": 1}}
    assert is_original(original)
    assert history(original) == {"training": {"lr": 1}}
    merged = {"notation": "a", "parents": {"a": {"file": "a.pt"}}, "selection": {"by": "x"}, "dtype": "F16"}
    assert not is_original(merged)
    assert history(merged) == {"notation": "a", "dtype": "F16", "parents": {"a": {"file": "a.pt"}}}
    assert history({"training": {"note": "x" * 20_000}}) == {}


def test_records_that_are_not_ours_do_no_harm() -> None:
    deep = '{"a":' * 70 + "1" + "}" * 70
    for text in (
        "not json",
        "[1]",
        '{"total": 7}',
        "[" * 100_000,
        '{"a": NaN}',
        deep,
        '{"a": ' + "9" * 5000 + "}",
    ):
        assert read_record({"clipmerge": text}) == {}
    assert parents_of({"parents": "a"}) == ()
    assert parents_of({"parents": {"a": 1, "b": {"file": 2, "digest": 3, "made": 4}}})[0].digest is None


def test_the_same_record_is_the_same_text() -> None:
    assert write_record({"b": 1, "a": "é"}) == write_record({"a": "é", "b": 1})
    assert write_record({"a": "é"})["clipmerge"] == '{"a":"é"}'


@pytest.mark.parametrize("value", [float("nan"), object(), {1, 2}])
def test_what_json_cannot_hold_is_refused(value: object) -> None:
    with pytest.raises(RecipeError, match="the metadata cannot be recorded"):
        write_record({"scores": value})


WORDS = st.sampled_from(
    ["notation", "parents", "made", "file", "digest", "training", "dtype", "model", "total", "a"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None, max_examples=150)
@given(st.dictionaries(WORDS, JSON, max_size=6))
def test_any_record_is_read_passed_on_and_shown_or_refused(record: dict[str, object]) -> None:
    """A file may say anything about itself: an error of ours or a result, never another exception."""
    from clipmerge_cli.looking import tree

    metadata = {"format": "pt", "clipmerge": json.dumps(record)}
    raw = np.zeros(4, np.uint8)
    checkpoint = Checkpoint("odd", {"x": Tensor("F32", (1,), (Extent(raw, 0, 4),))}, metadata)
    weights = Weights({checkpoint: Coefficient.of(1)}, checkpoint)
    with suppress(ClipmergeError):
        summary = inspect(checkpoint)
        tree(summary.name, summary.record)
        read = read_record(file_metadata(weights))
        assert read["notation"] == "odd"
