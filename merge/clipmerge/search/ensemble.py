"""The yardstick of a soup: the greedy ensemble, which averages logits and pays for each member at run time.

Source: Wortsman et al. 2022, arXiv 2203.05482, section 3.
"""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import numpy.typing as npt

from clipmerge.errors import SelectionError
from clipmerge.evaluate.metrics import METRICS, Predictions
from clipmerge.evaluate.score import Score, score_of
from clipmerge.search.results import SoupResult
from clipmerge.search.soup import Order, choose, open_candidates, rank
from clipmerge.types import Floats, Progress
from clipmerge.weights.labels import names_of
from clipmerge.weights.weights import Source, Weights

if TYPE_CHECKING:
    from clipmerge.evaluate.evaluator import Evaluator


def greedy_ensemble(
    checkpoints: Sequence[Source],
    evaluator: "Evaluator",
    *,
    split: str | None = None,
    strict: bool = False,
    order: Order = "score",
    seed: int = 0,
    on_progress: Progress | None = None,
) -> SoupResult:
    """Choose the members of an ensemble of logits, by the rule of `greedy_soup`.

    Each checkpoint runs once; its logits wait on disk, in a folder that is removed at the end.

    Raises:
        SelectionError: no checkpoints, an order that is no permutation, no such split.
    """
    weights, name = open_candidates(checkpoints), evaluator.split_name(split)
    with TemporaryDirectory(prefix="clipmerge-") as folder:
        path = {id(candidate): Path(folder) / f"{i}.npy" for i, candidate in enumerate(weights)}
        added, total = 0, cast("Floats", 0.0)

        def score_alone(candidate: Weights) -> Score:
            logits = evaluator.logits(candidate, name).numpy()
            np.save(path[id(candidate)], logits)
            return score_logits(logits, evaluator, name)

        def score_with(members: Sequence[Weights], candidate: Weights, incumbent: Score) -> Score:
            nonlocal added, total
            for member in members[added:]:
                total = total + np.load(path[id(member)])
            added = len(members)
            return score_logits((total + np.load(path[id(candidate)])) / (added + 1), evaluator, name)

        turns, alone = rank(weights, score_alone, "score", seed, on_progress)
        if order != "score":
            turns, _ = rank(weights, lambda each: alone[0], order, seed, None)
        members, steps, best = choose(weights, turns, alone, score_with, strict, on_progress)
    return SoupResult(
        "greedy_ensemble",
        None,
        tuple(step.name for step in steps if step.accepted),
        tuple(names_of(weights)),
        tuple(members),
        history=tuple(steps),
        score=best,
        split=name,
        strict=strict,
    )


def score_ensemble(members: Sequence[Source], evaluator: "Evaluator", split: str | None = None) -> Score:
    """Score the mean of the members' logits on any split."""
    return score_logits(ensemble_logits(members, evaluator, split), evaluator, split)


def ensemble_logits(
    members: Sequence[Source], evaluator: "Evaluator", split: str | None = None
) -> npt.NDArray[np.float32]:
    """Average the members' logits on a split, (n, classes)."""
    total: Any = sum(evaluator.logits(member, split).double() for member in members)
    mean: npt.NDArray[np.float32] = (total / len(members)).float().numpy()
    return mean


def score_logits(logits: npt.NDArray[Any], evaluator: "Evaluator", split: str | None = None) -> Score:
    """Score logits for every image of a split, (n, classes); classes that it lacks are -inf."""
    if METRICS[evaluator.metric].retrieval:
        hint = "use a metric of classes, such as top1"
        raise SelectionError(f"an ensemble of logits cannot be scored by {evaluator.metric}", hint=hint)
    labels, groups = evaluator.labels(split), evaluator.splits[evaluator.split_name(split)].groups
    true = np.take_along_axis(logits, labels[:, None], axis=1)
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    in_top5, confidence = (logits > true).sum(axis=1) < 5, 1 / odds.sum(axis=1)
    predictions = Predictions(labels, logits.argmax(axis=1), in_top5, confidence, groups)
    return score_of(predictions, evaluator.metric)
