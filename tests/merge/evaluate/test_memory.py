"""What a score is filed under, what memory and journal may answer, how scores compare."""

import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.merge.search.table import point, random_bits, table_evaluator

from clipmerge.evaluate.evaluator import Evaluator
from clipmerge.evaluate.journal import Journal, recipe_digest
from clipmerge.evaluate.score import Score, Stopped, is_better, read_result
from clipmerge.weights.digest import content_digest
from clipmerge.weights.methods import apply
from clipmerge.weights.weights import Weights, interpolate, load, mean

MASK = np.array([True, False, True, True])
RECORD = Score("top1", {"top1": 0.75, "ece": 0.1}, (0.3, 0.95), MASK).to_json(mask=True)


def key(weights: Weights) -> str:
    return recipe_digest(weights, content_digest)


def test_a_recipe_is_its_contents_and_coefficients_however_it_is_written(spread: Sequence[Path]) -> None:
    a, b = load(spread[0]), load(spread[1])
    assert key(mean([a, b])) == key(mean([b, a])) == key(interpolate(a, b, 0.5)) == key(0.5 * b + a / 2)
    assert key(mean([a, load(spread[1], "other_name")])) == key(mean([a, b]))
    assert len({key(a), key(b), key(mean([a, b])), key(interpolate(a, b, 0.25))}) == 4
    assert key(interpolate(a, b, {"visual": 0.5})) != key(interpolate(a, b, {"visual": 0.25}))
    assert key(apply("slerp", [a, b], t=0.5)) != key(apply("slerp", [a, b], t=0.25))
    assert key(apply("slerp", [a, b], t=0.5)) != key(apply("slerp", [b, a], t=0.5))


def test_a_record_is_read_back_as_it_was_scored(tmp_path: Path, evaluator: Evaluator, spread: Any) -> None:
    path, model, splits = tmp_path / "scores.jsonl", evaluator.model, evaluator.splits
    weights = load(spread[0])
    score = Evaluator(splits, model, journal=path).score(weights)
    again = Evaluator(splits, model, journal=path)
    read = again.score(load(spread[0], "another_name"))
    assert (again.images_scored, again.images_saved) == (0, 120)
    assert read.correct_mask.tolist() == score.correct_mask.tolist()
    assert read.to_json() == score.to_json()
    assert read.p_value(score) == 1.0
    other = Evaluator(splits, model, metric="macro_f1", journal=path)
    assert other.score(weights).value == score.metrics["macro_f1"]
    assert other.images_scored == 0


def test_a_score_is_paid_for_once_without_a_journal_too(evaluator: Evaluator, spread: Any) -> None:
    a, b = load(spread[0]), load(spread[1])
    first = evaluator.score(mean([a, b]))
    again = evaluator.score(interpolate(b, a, 0.5))
    assert again.to_json() == first.to_json()
    assert (evaluator.images_scored, evaluator.images_saved) == (120, 120)
    evaluator.score(load(spread[0]))
    evaluator.score(load(spread[0]))
    assert evaluator.images_scored == 240


def test_other_data_prompts_or_precision_are_other_scores(
    tmp_path: Path, evaluator: Evaluator, spread: Any
) -> None:
    weights, val, path = load(spread[0]), evaluator.splits["val"], tmp_path / "j"
    Evaluator(val, evaluator.model, journal=path).score(weights)
    options: Sequence[tuple[dict[str, Any], Any]] = (
        ({"templates": "a {}"}, val),
        ({"precision": "bf16"}, val),
        ({}, val.subset(range(100))),
    )
    for changed, split in options:
        other = Evaluator(split, evaluator.model, journal=path, **changed)
        other.score(weights)
        assert other.images_scored == len(split)


@pytest.mark.parametrize(
    "damage",
    [
        {"bits": "!!"},
        {"bits": "AAAA"},
        {"bits": ""},
        {"correct": 2},
        {"metrics": {"ece": 0.1}},
        {"metrics": None},
        {"n": "many"},
        {"n": 400},
    ],
)
def test_a_damaged_record_is_paid_for_again(damage: Mapping[str, Any]) -> None:
    whole = read_result(RECORD, "top1")
    assert isinstance(whole, Score)
    assert whole.correct_mask.tolist() == MASK.tolist()
    assert read_result({**RECORD, **damage}, "top1") is None


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_which_images_are_right_comes_back(mask: list[bool]) -> None:
    score = Score("top1", {"top1": sum(mask) / len(mask)}, (0.0, 1.0), np.array(mask, bool))
    back = read_result(score.to_json(mask=True), "top1")
    assert isinstance(back, Score)
    assert back.correct_mask.tolist() == mask


def test_a_stopped_pass_answers_for_its_own_metric_only() -> None:
    record = {"metric": "top1", "at_most": 0.5, "seen": 10, "n": 20}
    assert read_result(record, "top1") == Stopped("top1", 0.5, 20, 0)
    assert read_result(record, "macro_f1") is None


def test_a_journal_of_other_data_with_the_same_key_is_not_believed(tmp_path: Path) -> None:
    evaluator, table = table_evaluator({"val": 9}, random_bits(0, 9), journal=tmp_path / "j")
    evaluator.score(point("a"))
    (line,) = (tmp_path / "j").read_text().splitlines()
    Journal(tmp_path / "k").put(json.loads(line)["key"], RECORD)
    again, table = table_evaluator({"val": 9}, random_bits(0, 9), journal=tmp_path / "k")
    assert again.score(point("a")).n == 9
    assert len(table.asked) == 1


def test_scores_compare_exactly_and_less_is_better_where_it_is() -> None:
    def score(metric: str, value: float, mask: Any = MASK) -> Score:
        return Score(metric, {metric: value}, (0.0, 1.0), mask)

    assert score("top1", 1 / 3, np.array([True, False, False])).figure == Fraction(1, 3)
    assert score("ece", 0.25).figure == Fraction(-1, 4)
    assert score("macro_f1", 0.25).figure == Fraction(1, 4)
    assert is_better(score("ece", 0.2), score("ece", 0.25), strict=True)
    assert is_better(score("top1", 0.75), score("top1", 0.75))
    assert not is_better(score("top1", 0.75), score("top1", 0.75), strict=True)
    assert is_better(score("top1", 0.0), None, strict=True)


def test_images_scored_and_saved_add_up() -> None:
    evaluator, table = table_evaluator(
        {"val": 9, "test": 5}, lambda made, split: np.ones({"val": 9, "test": 5}[split])
    )
    a = point("a")
    evaluator.scores(a)
    evaluator.scores(a, ["val"])
    assert (evaluator.images_scored, evaluator.images_saved, table.images) == (14, 9, 14)
