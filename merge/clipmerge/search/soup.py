"""Soups: the uniform mean, and the greedy choice of what goes into it.

Source: Wortsman et al. 2022, arXiv 2203.05482 (Recipe 1).
"""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clipmerge.errors import SelectionError
from clipmerge.search.results import Table, chance, percent, plot, shares_table, span, step_headers
from clipmerge.types import Progress
from clipmerge.weights.check import check
from clipmerge.weights.weights import Weights, load_all, mean

if TYPE_CHECKING:
    from clipmerge.search.journal import Journal
    from clipmerge.search.judge import Judge

Order = Literal["score", "given", "random"] | Sequence[int]


@dataclass(frozen=True)
class SoupStep:
    """One candidate's turn.

    Attributes:
        number: 1 for the first.
        alone: the candidate's own score, None where the order did not ask for it.
        value: the score of the soup with it, None where the trial was stopped because it could not win.
        at_most: the best that a stopped trial could still have reached.
        seen: images that the trial looked at (0: the journal knew).
        size, best: ingredients, and their score, after this turn.
        interval: 95 % for `value`. p: McNemar's p of the trial against the soup before it.
    """

    number: int
    name: str
    alone: float | None
    value: float | None
    at_most: float | None
    accepted: bool
    seen: int
    size: int
    best: float
    interval: tuple[float, float] | None = None
    p: float | None = None

    @property
    def stopped(self) -> bool:
        return self.value is None


@dataclass(frozen=True)
class SoupResult:
    """A soup and how it came about.

    Attributes:
        weights: the soup, unread until it is saved or loaded.
        ingredients: names, in the order in which they were accepted.
        names: all candidates, in the order given.
        score: the soup's held-out score (`Score`), None for a uniform soup that nobody scored.
        coefficients: of a learned soup, name (or group, then name) → share.
        images: {"scored", "saved"}: images through a model, and spared by early stopping and the journal.
    """

    kind: Literal["uniform", "greedy", "learned"]
    weights: Weights
    ingredients: tuple[str, ...]
    names: tuple[str, ...]
    history: tuple[SoupStep, ...] = ()
    score: Any = None
    split: str | None = None
    strict: bool = False
    coefficients: dict[str, Any] | None = None
    temperature: float | None = None
    images: dict[str, int] | None = None

    def table(self) -> Table:
        """One row a candidate, in the order of their turns."""
        if self.coefficients is not None:
            return shares_table(self.coefficients, self.temperature)
        if not self.history:
            return Table(("checkpoint",), tuple((name,) for name in self.names), "uniform soup")
        return Table(
            step_headers(self.score.metric),
            tuple(step_row(step) for step in self.history),
            f"greedy soup: {len(self.ingredients)} of {len(self.names)}",
        )

    def to_json(self) -> dict[str, Any]:
        """Everything but the weights, ready for `json.dumps`."""
        from clipmerge.search.judge import mark_document

        document: dict[str, Any] = {
            "kind": f"{self.kind}_soup",
            "split": self.split,
            "metric": None if self.score is None else self.score.metric,
            "strict": self.strict,
            "candidates": list(self.names),
            "order": [step.name for step in self.history] or list(self.names),
            "ingredients": list(self.ingredients),
            "score": None if self.score is None else mark_document(self.score),
            "history": [step_document(step) for step in self.history],
        }
        extras = {"coefficients": self.coefficients, "temperature": self.temperature, "images": self.images}
        return document | {key: value for key, value in extras.items() if value is not None}

    def plot(self, path: str | Path) -> list[Path]:
        """Draw held-out score against candidates tried; the files written."""
        return plot(self.to_json(), path)


def uniform_soup(
    checkpoints: Sequence[Weights | str | os.PathLike[str]],
    evaluator: "Judge | None" = None,
    *,
    split: str = "val",
    journal: "Journal | str | os.PathLike[str] | None" = None,
) -> SoupResult:
    """The mean of all checkpoints; scored where there is an evaluator.

    Raises:
        SelectionError: there are none.
        MismatchError: they do not fit together.
    """
    weights = opened(checkpoints)
    names = tuple(map(name_of, weights))
    if evaluator is None:
        return SoupResult("uniform", mean(weights), names, names)
    from clipmerge.search.judge import Scorer

    scorer = Scorer(evaluator, journal)
    split = scorer.split(split)
    return SoupResult(
        "uniform", mean(weights), names, names, score=scorer.score(mean(weights), split), split=split
    )


def greedy_soup(
    checkpoints: Sequence[Weights | str | os.PathLike[str]],
    evaluator: "Judge",
    *,
    split: str = "val",
    strict: bool = False,
    order: Order = "score",
    seed: int = 0,
    journal: "Journal | str | os.PathLike[str] | None" = None,
    early_stop: bool = True,
    on_progress: Progress | None = None,
) -> SoupResult:
    """The greedy soup: each candidate in turn is tried, and stays if the mean's held-out score does not fall.

    Args:
        split: the evaluator's split that decides (the only one, whatever its name, where there is one).
        strict: keep a candidate only where the score rises.
        order: "score" (best alone first, ties in the order given), "given", "random" (by `seed`), or indices.
        journal: a file of scores already paid for, read and appended to.
        early_stop: end a trial as soon as it cannot win; the choice is the same without.

    Raises:
        SelectionError: no checkpoints, an order that is no permutation, no such split.
    """
    from clipmerge.search.judge import Scorer
    from clipmerge.search.trials import MeanTrials

    weights = opened(checkpoints)
    scorer = Scorer(evaluator, journal)
    split = scorer.split(split)
    turns, alone = ranked(weights, scorer, split, order, seed, on_progress)
    trials = MeanTrials(scorer, split, strict=strict, early_stop=early_stop)
    for mark in alone.values():
        trials.learn(mark)
    steps: list[SoupStep] = []
    for turn in turns:
        candidate, own = weights[turn], alone.get(turn)
        if on_progress and steps:
            on_progress("trying", len(steps), len(turns))
        steps.append(trials.step(candidate, own))
    if on_progress:
        on_progress("trying", len(turns), len(turns))
    return SoupResult(
        "greedy",
        mean(trials.ingredients),
        tuple(map(name_of, trials.ingredients)),
        tuple(map(name_of, weights)),
        tuple(steps),
        trials.incumbent,
        split,
        strict,
        images={"scored": scorer.scored, "saved": scorer.saved},
    )


def ranked(
    weights: Sequence[Weights], scorer: Any, split: str, order: Order, seed: int, on_progress: Progress | None
) -> tuple[list[int], dict[int, Any]]:
    """The order of turns, and the marks that it took to find it (index → mark)."""
    from clipmerge.search.judge import goodness

    if order == "score":
        marks = {}
        for index, candidate in enumerate(weights):
            if on_progress:
                on_progress("ranking", index, len(weights))
            marks[index] = scorer.score(candidate, split)
        if on_progress:
            on_progress("ranking", len(weights), len(weights))
        return by_score([goodness(marks[i]) for i in range(len(weights))]), marks
    turns = permutation(order, len(weights), seed)
    return turns, {turns[0]: scorer.score(weights[turns[0]], split)}


def by_score(scores: Sequence[Any]) -> list[int]:
    """Indices, best score first; equal scores in the order given."""
    return sorted(range(len(scores)), key=lambda index: -scores[index])


def permutation(order: Order, count: int, seed: int) -> list[int]:
    """The turns that `order` means for `count` candidates, "score" excepted."""
    if order == "given":
        return list(range(count))
    if order == "random":
        turns = list(range(count))
        random.Random(seed).shuffle(turns)
        return turns
    if isinstance(order, str) or sorted(order) != list(range(count)):
        raise SelectionError(
            f"the order {order!r} does not name each of {count} checkpoints once",
            hint='use "score", "given", "random", or a permutation of 0, 1, 2 …',
        )
    return list(order)


def opened(checkpoints: Sequence[Weights | str | os.PathLike[str]]) -> list[Weights]:
    """Weights for each, which fit together; paths are opened, with names that are distinct."""
    if not checkpoints:
        raise SelectionError("there are no checkpoints to choose from", hint="give at least one")
    paths = [c for c in checkpoints if not isinstance(c, Weights)]
    loaded = iter(load_all([Path(os.fspath(path)) if not isinstance(path, str) else path for path in paths]))
    weights = [c if isinstance(c, Weights) else next(loaded) for c in checkpoints]
    check(mean(weights), dtype="F32")  # whether float dtypes agree matters to a file only
    return weights


def name_of(weights: Weights) -> str:
    """What to call a candidate: its notation, which for one checkpoint is the checkpoint's name."""
    return repr(weights)


def step_document(step: SoupStep) -> dict[str, Any]:
    """A step for JSON."""
    document = {name: getattr(step, name) for name in SoupStep.__dataclass_fields__}
    interval = None if step.interval is None else list(step.interval)
    return document | {"stopped": step.stopped, "interval": interval}


def step_row(step: SoupStep) -> tuple[str, ...]:
    """A step for a table."""
    shown = f"≤ {percent(step.at_most)}" if step.stopped else percent(step.value)
    verdict = "accepted" if step.accepted else "refused"
    return (
        str(step.number),
        step.name,
        percent(step.alone),
        shown,
        span(step.interval),
        chance(step.p),
        verdict,
        percent(step.best),
    )
