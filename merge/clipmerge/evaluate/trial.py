"""Trials of a greedy soup: the mean with one more, scored until its fate is certain."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from clipmerge.errors import SelectionError
from clipmerge.evaluate.metrics import METRICS, Predictions
from clipmerge.evaluate.score import Score, score_of

if TYPE_CHECKING:
    from clipmerge.evaluate.evaluator import Evaluator
    from clipmerge.weights.weights import Weights

__all__ = ["Outcome", "Trial"]

Order = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Outcome:
    """How a trial ended.

    Attributes:
        accepted: the answer of the full pass, whether or not there was one.
        score: the full score, None where the trial was stopped because it could not win.
        bound: the best value that the deciding metric could still reach; its value where there is a score.
    """

    accepted: bool
    score: Score | None
    bound: float
    images_scored: int
    images_saved: int


class Trial:
    """A running mean that lives in an evaluator's model, and candidates tried against it.

    A trial is one lerp per tensor from the mean, held beside the model, into its parameters. Images that
    earlier candidates had wrong come first. A trial ends as soon as it loses even if every image left is
    right. No metric that this is done for can fall when an image becomes right, so that the full pass would
    refuse it as well.
    """

    def __init__(self, evaluator: "Evaluator", split: str, *, strict: bool = False) -> None:
        self._evaluator = evaluator
        self._split = split
        self._strict = strict
        self._hardness = Hardness(len(evaluator.splits[split]))
        self._incumbent: Score | None = None
        self._last: Score | None = None

    @property
    def incumbent(self) -> Score:
        """The mean's score.

        Raises:
            SelectionError: the trial has not begun.
        """
        if self._incumbent is None:
            raise SelectionError(
                "there is no mean yet to try candidates against", hint="call begin(weights) first"
            )
        return self._incumbent

    def learn(self, score: Score) -> None:
        """Take note of what a candidate alone had wrong: those images come first in trials."""
        self._hardness.learn(score.bits, np.ones(score.n, bool))

    def begin(self, weights: "Weights", score: Score | None = None) -> Score:
        """Make the weights, computed exactly, the mean; its score, measured where it is not given."""
        self._evaluator.load(weights)
        self._evaluator.resident.hold()
        self._incumbent = score or self._evaluator.score_resident(self._split)
        self._hardness.learn(self._incumbent.bits, np.ones(self._incumbent.n, bool))
        self._last = None
        return self._incumbent

    def propose(self, candidate: "Weights", t: float, *, early_stop: bool = True) -> Outcome:
        """Try mean + t · (candidate - mean), which stays in the model.

        Args:
            t: 1/(k+1) where the mean has k ingredients.
            early_stop: end as soon as the outcome is certain; it is the same without.
        """
        wins = better_than(self.incumbent, self._strict)
        evaluator = self._evaluator
        evaluator.forget_loaded()
        evaluator.resident.lerp(candidate, t)
        can_stop = early_stop and METRICS[self.incumbent.metric].higher_is_better
        partial = evaluator.run(
            self._split,
            order=self._hardness.order(),
            hopeless=(lambda said: not wins(said)) if can_stop else None,
        )
        said = partial.predictions
        self._hardness.learn(said.right, partial.judged)
        self._last = score_of(said, self.incumbent.metric) if partial.complete else None
        value = METRICS[self.incumbent.metric].compute(said)
        return Outcome(wins(said), self._last, value, partial.seen, len(said) - partial.seen)

    def accept(self) -> Score:
        """Make the last proposal the mean; its score is the incumbent's now.

        Raises:
            SelectionError: there is no proposal that was scored in full.
        """
        if self._last is None:
            raise SelectionError(
                "there is no proposal to accept", hint="only a full score can be the incumbent's"
            )
        self._evaluator.resident.hold()
        self._incumbent, self._last = self._last, None
        return self._incumbent


def better_than(incumbent: Score, strict: bool) -> Callable[[Predictions], bool]:
    """Whether predictions hold their own against the incumbent (≥), or beat it where `strict` (>)."""
    metric = METRICS[incumbent.metric]

    def wins(said: Predictions) -> bool:
        if incumbent.metric == "top1":
            new, old = float(said.right.sum()), float(incumbent.correct)
        else:
            new, old = metric.compute(said), incumbent.value
        new, old = (new, old) if metric.higher_is_better else (old, new)
        return new > old if strict else new >= old

    return wins


class Hardness:
    """How often each image was wrong, and so the order in which a hopeless trial ends soonest."""

    def __init__(self, n: int) -> None:
        self._wrong = np.zeros(n)
        self._judged = np.zeros(n)

    def learn(self, right: npt.NDArray[np.bool_], judged: npt.NDArray[np.bool_]) -> None:
        """Take note of one pass."""
        self._wrong += judged & ~right
        self._judged += judged

    def order(self) -> Order:
        """Images most often wrong first; ties in their own order."""
        return np.argsort(-(self._wrong / np.maximum(self._judged, 1)), kind="stable")
