"""Thresholds of Consensus TA, each task's by the held-out score of the entries that matter to it."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from clipmerge.errors import SelectionError
from clipmerge.ops import vectors
from clipmerge.types import Progress
from clipmerge.weights.expression import Method
from clipmerge.weights.methods import METHODS, apply
from clipmerge.weights.weights import Source, Weights, open_all

if TYPE_CHECKING:
    from clipmerge.evaluate.evaluator import Evaluator

GRID = (0.2, 0.3, 0.4, 0.5, 0.6)
_MASKED = Method(
    "tall_mask", vectors.tall_mask, "vectors", 0, "entries", symmetric=False,
    options={"threshold": METHODS["consensus"].options["threshold"]},
)  # fmt: skip


def consensus_thresholds(
    base: Source,
    tuned: Mapping[str, Source],
    evaluator: "Evaluator",
    *,
    grid: Sequence[float] = GRID,
    on_progress: Progress | None = None,
) -> tuple[float, ...]:
    """Choose each task's threshold of `consensus`: the one whose masked model scores best on the task's split.

    A task's masked model is the base plus the sum of all task vectors in the entries that matter to the task; of equal
    scores the largest threshold is taken.

    Args:
        tuned: split → the model that was finetuned for it.

    Returns:
        A threshold for each task, in order: `consensus(vectors, threshold=…)`.

    Raises:
        SelectionError: no task, or no threshold to try.

    Source: Wang et al. 2024, arXiv 2405.07813.
    """
    if not tuned or not grid:
        raise SelectionError("thresholds need tasks, each with held-out images, and numbers to try")
    start, *models = open_all([base, *tuned.values()])
    moved: list[Weights] = [model - start if model.kind() == 1 else model for model in models]
    chosen, done = [], 0
    with evaluator.together([start, *models]):
        for number, split in enumerate(tuned):
            operands = [moved[number], *moved[:number], *moved[number + 1 :]]
            scored = []
            for threshold in sorted(grid, reverse=True):
                masked = start + apply(_MASKED, operands, threshold=threshold)
                scored.append((evaluator.score(masked, split).figure, threshold))
                done += 1
                if on_progress:
                    on_progress("thresholds", done, len(tuned) * len(grid))
            chosen.append(max(scored, key=lambda pair: pair[0])[1])  # the first of equals
    return tuple(chosen)
