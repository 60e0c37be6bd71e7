"""Thresholds of Consensus TA chosen on images, against masked models made by hand."""

from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import clipmerge as cm
from clipmerge.errors import SelectionError
from clipmerge.ops.vectors import tall_mask
from clipmerge.search.leaderboard import leaderboard
from clipmerge.weights.weights import Weights


@pytest.fixture(scope="module")
def models(tiny_checkpoints: Mapping[str, Path]) -> list[Weights]:
    return cm.load_all([tiny_checkpoints[name] for name in ("base", "ft0", "ft1")])


@pytest.fixture(scope="module")
def evaluator(tiny_spec: Any) -> cm.Evaluator:
    splits = {"a": "digits#val[:40]", "b": "digits#val[:40]@rotate:20"}
    return cm.Evaluator({n: cm.open_split(s) for n, s in splits.items()}, tiny_spec, device="cpu")


def test_each_task_takes_the_threshold_whose_masked_model_is_best(
    models: list[Weights], evaluator: cm.Evaluator
) -> None:
    base, a, b = models
    grid = (0.05, 0.2, 0.6, 2.0, 8.0)
    start, one, other = (w.state_dict() for w in models)
    expected, figures = [], []
    for split, mine, theirs in (("a", one, other), ("b", other, one)):
        scored: dict[float, Fraction] = {}
        for threshold in grid:
            masked = {}
            for name, tensor in start.items():
                v, rest = mine[name] - tensor, theirs[name] - tensor
                masked[name] = tensor + (v + rest) * (v.abs() > threshold * ((v + rest) - v).abs())
            scored[threshold] = evaluator.score(cm.from_state_dict(masked, "masked"), split).figure
        figures.append(set(scored.values()))
        expected.append(max(t for t in grid if scored[t] == max(scored.values())))
    assert all(len(values) > 1 for values in figures)  # there is something to choose
    assert cm.consensus_thresholds(base, {"a": a, "b": b}, evaluator, grid=grid) == tuple(expected)
    vectors = {"a": a - base, "b": b - base}
    assert cm.consensus_thresholds(base, vectors, evaluator, grid=grid) == tuple(expected)


def test_of_equal_scores_the_largest_threshold(models: list[Weights], evaluator: cm.Evaluator) -> None:
    base, a, _ = models
    assert cm.consensus_thresholds(base, {"a": a}, evaluator) == (0.6,)  # of one task everything is its own
    with pytest.raises(SelectionError, match="thresholds need tasks"):
        cm.consensus_thresholds(base, {}, evaluator)


def test_a_leaderboard_chooses_them(models: list[Weights], evaluator: cm.Evaluator) -> None:
    base, a, b = models
    tasks = {"a": a, "b": b}
    chosen = cm.consensus_thresholds(base, tasks, evaluator)
    board = leaderboard(
        base, tasks, evaluator, ["consensus", "consensus(threshold=0.6)"], grid=[Fraction(1, 2)]
    )
    notations = {entry.name: repr(entry.weights) for entry in board.entries[2:]}
    assert f"threshold=[{', '.join(map(str, chosen))}]" in notations["consensus"]
    assert "threshold=0.6" in notations["consensus(threshold=0.6)"]


def test_a_mask_by_hand() -> None:
    first, second = np.array([1.0, 1.0, 0.0, 2.0]), np.array([3.0, -1.0, 5.0, 0.0])
    # |1| > .4·|3| is not so; |1| > .4·|1|, and their sum is 0; 0 matters to nobody; 2 > 0
    np.testing.assert_array_equal(tall_mask(first, second, threshold=0.4), [0.0, 0.0, 0.0, 2.0])
    np.testing.assert_array_equal(tall_mask(first, second, threshold=0.3), [4.0, 0.0, 0.0, 2.0])
