"""The yardstick of a soup: the greedy ensemble, which averages logits and pays for each member at run time.

Source: Wortsman et al. 2022, arXiv 2203.05482, section 3.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from clipmerge.search.judge import Scorer, goodness, mark_document, mcnemar_p
from clipmerge.search.results import Table, plot, step_headers
from clipmerge.search.soup import (
    Order,
    SoupStep,
    by_score,
    name_of,
    opened,
    permutation,
    step_document,
    step_row,
)
from clipmerge.types import Progress
from clipmerge.weights.weights import Weights

if TYPE_CHECKING:
    from clipmerge.evaluate.evaluator import Evaluator

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True)
class EnsembleResult:
    """An ensemble and how it came about.

    Attributes:
        members: its weights, each of which must run for every image. ingredients: their names.
        score: the held-out score of the mean logits.
    """

    members: tuple[Weights, ...] = field(repr=False)
    ingredients: tuple[str, ...]
    names: tuple[str, ...]
    history: tuple[SoupStep, ...]
    score: Any
    split: str
    strict: bool = False

    def logits(self, evaluator: "Evaluator", split: str | None = None) -> Logits:
        """The mean of the members' logits on a split, (n, classes)."""
        total = sum(evaluator.logits(member, split).double() for member in self.members)
        mean: Logits = (total / len(self.members)).float().numpy()  # type: ignore[union-attr]
        return mean

    def evaluate(self, evaluator: "Evaluator", split: str | None = None) -> Any:
        """The ensemble's score on any split."""
        return score_of_logits(self.logits(evaluator, split), evaluator, Scorer(evaluator).split(split or ""))

    def table(self) -> Table:
        """One row a candidate, in the order of their turns."""
        title = f"greedy ensemble: {len(self.ingredients)} of {len(self.names)}"
        headers = step_headers(self.score.metric)
        return Table(headers, tuple(step_row(step) for step in self.history), title)

    def to_json(self) -> dict[str, Any]:
        """Ready for `json.dumps`."""
        return {
            "kind": "greedy_ensemble",
            "split": self.split,
            "metric": self.score.metric,
            "strict": self.strict,
            "candidates": list(self.names),
            "order": [step.name for step in self.history],
            "ingredients": list(self.ingredients),
            "score": mark_document(self.score),
            "history": [step_document(step) for step in self.history],
        }

    def plot(self, path: str | Path) -> list[Path]:
        """Draw held-out score against candidates tried; the files written."""
        return plot(self.to_json(), path)


def greedy_ensemble(
    checkpoints: Sequence[Weights | str | os.PathLike[str]],
    evaluator: "Evaluator",
    *,
    split: str = "val",
    strict: bool = False,
    order: Order = "score",
    seed: int = 0,
    on_progress: Progress | None = None,
) -> EnsembleResult:
    """The greedy ensemble of logits, chosen by the rule of `greedy_soup`.

    Each checkpoint runs once; its logits wait on disk, in a folder that is removed at the end.

    Raises:
        SelectionError: no checkpoints, an order that is no permutation, no such split.
    """
    weights = opened(checkpoints)
    split = Scorer(evaluator).split(split)
    with TemporaryDirectory(prefix="clipmerge-") as folder:
        kept, marks = [], []
        for index, candidate in enumerate(weights):
            if on_progress:
                on_progress("running", index, len(weights))
            found = evaluator.logits(candidate, split).numpy()
            marks.append(score_of_logits(found, evaluator, split))
            path = Path(folder) / f"{index}.npy"
            np.save(path, found)
            kept.append(path)
        if on_progress:
            on_progress("running", len(weights), len(weights))
        by = [goodness(mark) for mark in marks]
        turns = by_score(by) if order == "score" else permutation(order, len(weights), seed)
        chosen, steps, score = _choose(turns, weights, marks, kept, evaluator, split, strict)
    names = tuple(map(name_of, weights))
    members = tuple(weights[turn] for turn in chosen)
    return EnsembleResult(members, tuple(map(name_of, members)), names, steps, score, split, strict)


def score_of_logits(logits: npt.NDArray[Any], evaluator: "Evaluator", split: str) -> Any:
    """The score of logits for every image of a split, (n, classes); classes that it lacks are -inf."""
    from clipmerge.evaluate.metrics import Predictions
    from clipmerge.evaluate.score import score_of

    labels, groups = evaluator.labels(split), evaluator.splits[split].groups
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    odds = np.exp(logits - logits.max(axis=1, keepdims=True))
    said = Predictions(
        labels, logits.argmax(axis=1), (logits > own).sum(axis=1) < 5, 1 / odds.sum(axis=1), groups
    )
    return score_of(said, evaluator.metric)


def _choose(
    turns: Sequence[int],
    weights: Sequence[Weights],
    marks: Sequence[Any],
    kept: Sequence[Path],
    evaluator: "Evaluator",
    split: str,
    strict: bool,
) -> tuple[list[int], tuple[SoupStep, ...], Any]:
    chosen: list[int] = []
    steps: list[SoupStep] = []
    total: npt.NDArray[Any] = np.zeros(())
    best: Any = None
    for number, turn in enumerate(turns, 1):
        proposed = total + np.load(kept[turn]).astype(np.float64)
        mark = score_of_logits(proposed / (len(chosen) + 1), evaluator, split)
        before = best
        new, old = goodness(mark), None if best is None else goodness(best)
        accepted = old is None or (new > old if strict else new >= old)
        if accepted:
            chosen, total, best = [*chosen, turn], proposed, mark
        steps.append(
            SoupStep(
                number=number,
                name=name_of(weights[turn]),
                alone=float(marks[turn].value),
                value=float(mark.value),
                at_most=None,
                accepted=accepted,
                seen=mark.n,
                size=len(chosen),
                best=float((best or mark).value),
                interval=(float(mark.interval[0]), float(mark.interval[1])),
                p=None if before is None else mcnemar_p(before, mark),
            )
        )
    return chosen, tuple(steps), best
