"""One turn of a greedy soup in the resident model: propose, decide, and keep or leave."""

from typing import Any

from clipmerge.errors import NonFiniteError
from clipmerge.search.judge import Bound, Scorer, goodness, mcnemar_p
from clipmerge.search.soup import SoupStep, name_of
from clipmerge.weights.weights import Weights, mean


class MeanTrials:
    """The running soup. `ingredients` and `incumbent` (its score) change with each accepted step.

    A trial is one lerp from the mean held beside the model. After an acceptance that mean is made anew by the
    exact pass, so that rounding never adds up and a resumed search computes what an unbroken one does.
    """

    def __init__(self, scorer: Scorer, split: str, *, strict: bool, early_stop: bool) -> None:
        self.scorer = scorer
        self.split = split
        self.strict = strict
        self.early_stop = early_stop
        self.ingredients: list[Weights] = []
        self.incumbent: Any = None
        self._trial: Any = None
        self._known: list[Any] = []
        self._held = -1
        self._turns = 0

    def learn(self, mark: Any) -> None:
        """Take note of a candidate's own score: what it had wrong comes first in trials."""
        self._known.append(mark)

    def step(self, candidate: Weights, alone: Any) -> SoupStep:
        """Let one candidate have its turn; the first one is always in."""
        self._turns += 1
        before = self.incumbent
        spent = self.scorer.scored
        outcome = alone if not self.ingredients else self._propose(candidate)
        accepted = not isinstance(outcome, Bound) and (before is None or self._keeps(outcome))
        if accepted:
            self.ingredients.append(candidate)
            self.incumbent = outcome
        stopped = isinstance(outcome, Bound)
        return SoupStep(
            number=self._turns,
            name=name_of(candidate),
            alone=None if alone is None else float(alone.value),
            value=None if stopped else float(outcome.value),
            at_most=float(outcome.value) if stopped else None,
            accepted=accepted,
            seen=self.scorer.scored - spent,
            size=len(self.ingredients),
            best=float(self.incumbent.value),
            interval=None if stopped else (float(outcome.interval[0]), float(outcome.interval[1])),
            p=None if stopped or before is None else mcnemar_p(before, outcome),
        )

    def _propose(self, candidate: Weights) -> Any:
        """The mark of the soup with `candidate`, or a Bound where it cannot win."""
        proposed = mean([*self.ingredients, candidate])
        key = self.scorer.key(proposed, self.split)
        known = self.scorer.known(key, self.split)
        if known is not None and not (isinstance(known, Bound) and self._could_win(known)):
            self.scorer.saved += known.n
            return known
        if self._held != len(self.ingredients):
            if self._trial is None:
                self._trial = self.scorer.judge.trial(self.split, self.strict)
                for mark in self._known:
                    self._trial.learn(mark)
            self._trial.begin(mean(self.ingredients), self.incumbent)
            self._held = len(self.ingredients)
        try:
            share = 1 / (len(self.ingredients) + 1)
            outcome = self._trial.propose(candidate, share, early_stop=self.early_stop)
        except NonFiniteError as error:
            raise NonFiniteError(f"with {name_of(candidate)}, {error.message}", hint=error.hint) from error
        if outcome.score is not None:
            return self.scorer.learn(key, proposed, self.split, outcome.score)
        bound = Bound(float(outcome.bound), int(outcome.images_scored), self.scorer.size(self.split))
        self.scorer.learn_bound(key, proposed, self.split, bound)
        return bound

    def _keeps(self, mark: Any) -> bool:
        new, old = goodness(mark), goodness(self.incumbent)
        return new > old if self.strict else new >= old

    def _could_win(self, bound: Bound) -> bool:
        if self.scorer.metric == "top1":
            reach, best = bound.value, self.incumbent.value
            return bool(reach > best if self.strict else reach >= best)
        return True
