"""The scorer: what a score is filed under, what the journal may answer, how scores compare."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.merge.search.table_judge import TableJudge, point, random_bits

from clipmerge.evaluate.evaluator import Evaluator
from clipmerge.evaluate.score import Score
from clipmerge.search.journal import Journal, pack_bits
from clipmerge.search.judge import Bound, Scorer, goodness, read_record, recipe_digest
from clipmerge.weights.digest import content_digest
from clipmerge.weights.methods import apply
from clipmerge.weights.weights import Weights, interpolate, load, mean

BITS = np.array([True, False, True, True])
MARK: Mapping[str, Any] = {"correct": 3, "n": 4, "metric": "top1", "metrics": {"top1": 0.75, "ece": 0.1},
                           "interval": [0.3, 0.95], "bits": pack_bits(BITS)}  # fmt: skip


def key(weights: Weights) -> str:
    return recipe_digest(weights, content_digest)


def test_a_recipe_is_its_contents_and_coefficients_however_it_is_written(spread: Sequence[Path]) -> None:
    a, b = load(spread[0]), load(spread[1])
    assert key(mean([a, b])) == key(mean([b, a])) == key(interpolate(a, b, 0.5)) == key(0.5 * b + a / 2)
    assert key(mean([a, load(spread[1], "other_name")])) == key(mean([a, b]))
    assert len({key(a), key(b), key(mean([a, b])), key(interpolate(a, b, 0.25))}) == 4
    assert key(interpolate(a, b, {"visual": 0.5})) != key(interpolate(a, b, {"visual": 0.25}))
    assert key(apply("slerp", [a, b], t=0.5)) != key(apply("slerp", [a, b], alpha=0.25))
    assert key(apply("slerp", [a, b], t=0.5)) != key(apply("slerp", [b, a], alpha=0.5))


def test_a_record_is_read_back_as_it_was_scored(tmp_path: Path, evaluator: Evaluator, spread: Any) -> None:
    path = tmp_path / "scores.jsonl"
    weights = load(spread[0])
    score = Scorer(evaluator, path).score(weights, "val")
    again = Scorer(evaluator, path)
    read = again.score(weights, "val")
    assert again.scored == 0
    assert read.bits.tolist() == score.bits.tolist()
    assert (read.value, read.metrics, read.interval) == (score.value, score.metrics, score.interval)
    other = Evaluator(evaluator.model, evaluator.splits, metric="macro_f1")
    assert Scorer(other, path).score(weights, "val").value == score.metrics["macro_f1"]
    assert other.images_scored == 0


def test_other_data_prompts_or_precision_are_other_scores(
    tmp_path: Path, evaluator: Evaluator, spread: Any
) -> None:
    weights = load(spread[0])
    Scorer(evaluator, tmp_path / "j").score(weights, "val")
    val = evaluator.splits["val"]
    for options, split in (
        ({"templates": "a {}"}, val),
        ({"precision": "bf16"}, val),
        ({}, val.subset(range(100))),
    ):
        judge = Evaluator(evaluator.model, {"val": split}, **options)  # type: ignore[arg-type]
        scorer = Scorer(judge, tmp_path / "j")
        assert scorer.known(scorer.key(weights, "val"), "val") is None


@pytest.mark.parametrize(
    "damage",
    [
        {"bits": "!!"},
        {"bits": "AAAA"},
        {"correct": 2},
        {"metrics": {"ece": 0.1}},
        {"metrics": None},
        {"n": "many"},
        {"n": 400},
    ],
)
def test_a_damaged_record_is_paid_for_again(damage: Mapping[str, Any]) -> None:
    assert read_record(MARK, "top1").bits.tolist() == BITS.tolist()
    assert read_record({**MARK, **damage}, "top1") is None


def test_a_bound_answers_for_its_own_metric_only() -> None:
    record = {"metric": "top1", "at_most": 0.5, "seen": 10, "n": 20}
    assert read_record(record, "top1") == Bound(0.5, 10, 20)
    assert read_record(record, "macro_f1") is None


def test_a_journal_of_other_data_with_the_same_key_is_not_believed(tmp_path: Path) -> None:
    judge = TableJudge({"val": 9}, random_bits(0, 9))
    scorer = Scorer(judge, tmp_path / "j")
    Journal(tmp_path / "j").put(scorer.key(point("a"), "val"), MARK)
    assert Scorer(judge, tmp_path / "j").score(point("a"), "val").n == 9
    assert len(judge.asked) == 1


def test_scores_compare_exactly_and_less_is_better_where_it_is() -> None:
    top1 = Score("top1", {"top1": 1 / 3}, (0.0, 1.0), np.array([True, False, False]))
    assert goodness(top1) == Fraction(1, 3)
    assert goodness(Score("ece", {"ece": 0.25}, (0.0, 1.0), BITS)) == Fraction(-1, 4)
    assert goodness(Score("macro_f1", {"macro_f1": 0.25}, (0.0, 1.0), BITS)) == Fraction(1, 4)


def test_images_scored_and_saved_add_up(tmp_path: Path) -> None:
    judge = TableJudge({"val": 9, "test": 5}, random_bits(0, 9))
    scorer = Scorer(judge, tmp_path / "j")
    judge.bits = lambda made, split: np.ones(len(judge.splits[split]), bool)
    scorer.scores(point("a"), ["val", "test"])
    scorer.scores(point("a"), ["val"])
    assert (scorer.scored, scorer.saved) == (14, 9)
