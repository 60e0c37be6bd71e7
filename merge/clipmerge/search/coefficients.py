"""Several coefficients at once: one a task, a tower or a block, found within a budget of evaluations."""

import os
import random
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clipmerge.errors import MissingExtraError, SelectionError
from clipmerge.search.judge import Judge, Scorer, mark_document, scorer_of
from clipmerge.search.results import MOST_COLUMNS, Table, percent, plot
from clipmerge.search.rules import Rule
from clipmerge.search.sweep import rule_document
from clipmerge.types import Progress
from clipmerge.weights.names import block_of, tower_of

if TYPE_CHECKING:
    from clipmerge.search.journal import Journal
    from clipmerge.weights.weights import Weights

Method = Literal["coordinate", "random", "cmaes"]
Per = Literal["task", "tower", "block"]
Family = Callable[[Mapping[str, float]], "Weights"]
Vector = tuple[float, ...]
Search = Generator[Vector, Fraction | None, None]
"""Yields a vector to score, is sent its figure (None: not allowed)."""

_DIGITS = 4


@dataclass(frozen=True)
class CoefficientsPoint:
    """One vector tried, and what it scored."""

    coefficients: Mapping[str, float]
    scores: Mapping[str, Any]
    value: Fraction
    allowed: bool


@dataclass(frozen=True)
class CoefficientsResult:
    """A search over several coefficients and its choice.

    Attributes:
        coefficients: name → number, as chosen. history: every vector tried, in order.
    """

    method: Method
    rule: Rule
    weights: "Weights"
    coefficients: Mapping[str, float]
    chosen: CoefficientsPoint
    history: tuple[CoefficientsPoint, ...]
    images: Mapping[str, int]

    def table(self) -> Table:
        """One row each time the figure rose, then the choice; the numbers where they fit on a screen."""
        shown = tuple(self.coefficients) if len(self.coefficients) <= MOST_COLUMNS else ()
        headers = ("evaluation", *(f"×{name}" for name in shown), *self.chosen.scores, self.rule.name)
        rows, best = [], None
        for number, point in enumerate(self.history, 1):
            if point.allowed and (best is None or point.value > best or point is self.chosen):
                best = point.value
                numbers = (f"{point.coefficients[name]:g}" for name in shown)
                marks = (percent(mark.value) for mark in point.scores.values())
                rows.append((str(number), *numbers, *marks, percent(float(point.value))))
        return Table(headers, tuple(rows), f"{self.method} search: {self.rule.says}")

    def to_json(self) -> dict[str, Any]:
        """Everything but the weights, ready for `json.dumps`."""
        return {
            "kind": "coefficients",
            "method": self.method,
            "rule": rule_document(self.rule),
            "coefficients": dict(self.coefficients),
            "points": [
                {
                    "coefficients": dict(point.coefficients),
                    "value": float(point.value),
                    "allowed": point.allowed,
                    "chosen": point is self.chosen,
                    "scores": {split: mark_document(mark) for split, mark in point.scores.items()},
                }
                for point in self.history
            ],
            "images": dict(self.images),
        }

    def plot(self, path: str | Path) -> list[Path]:
        """Draw the figure against evaluations; the files written."""
        return plot(self.to_json(), path)


def task_family(
    base: "Weights", tuned: "Mapping[str, Weights]", per: Per = "task"
) -> tuple[tuple[str, ...], Family]:
    """Names of coefficients, and what turns numbers for them into base + Σ coefficient · (tuned − base).

    Args:
        per: one coefficient a task, or a task and tower (`cars:visual`), or a task and transformer block
            (`cars:visual.block[3]`); tensors outside the towers' blocks go with their tower.
    """
    parts = () if per == "task" else groups_of(base.names, per)
    keys = {task: tuple((f"{task}:{part}", part) for part in parts) or ((task, "*"),) for task in tuned}

    def family(numbers: Mapping[str, float]) -> "Weights":
        made = base
        for task, weights in tuned.items():
            rules = {part: numbers[name] for name, part in keys[task]}
            made = made + (weights - base) * (rules["*"] if set(rules) == {"*"} else {**rules})
        return made

    return tuple(name for pairs in keys.values() for name, _ in pairs), family


def groups_of(names: Sequence[str], per: Literal["tower", "block"]) -> tuple[str, ...]:
    """Patterns that cover every name; the first that matches decides.

    Blocks come before what is left of their tower, and `*` (logit scale and the like) comes last.
    """
    blocks = {(tower_of(name), number) for name in names if (number := block_of(name)) is not None}
    blocks = {(tower, number) for tower, number in blocks if tower in ("visual", "text")}
    fine = tuple(f"{tower}.block[{number}]" for tower, number in sorted(blocks)) if per == "block" else ()
    towers = tuple(tower for tower in ("visual", "text", "head") if any(tower_of(n) == tower for n in names))
    return (*fine, *towers, "*") if any(tower_of(n) == "other" for n in names) else (*fine, *towers)


def search_coefficients(
    family: Family,
    names: Sequence[str],
    evaluator: Judge | Scorer,
    *,
    rule: Rule,
    method: Method = "coordinate",
    budget: int = 60,
    low: float = 0.0,
    high: float = 1.0,
    start: float | Sequence[float] | None = None,
    seed: int = 0,
    journal: "Journal | str | os.PathLike[str] | None" = None,
    on_progress: Progress | None = None,
) -> CoefficientsResult:
    """Search numbers for `names` so that the rule's figure for `family(numbers)` is large.

    Args:
        method: "coordinate" (a line search along each name in turn, in ever smaller steps), "random"
            (uniform), "cmaes" (covariance matrix adaptation by Optuna, the `sweep` extra).
        budget: models scored; a vector met again costs nothing.
        start: where the search begins, by default 1/len(names) of the range for each.
        journal: a file of scores already paid for: a search that was killed repeats its steps from it.

    Raises:
        SelectionError: no names, no budget, an empty range, or nothing that the rule allows.
        MissingExtraError: "cmaes" without Optuna.
    """
    first = _start(start, len(names), low, high)
    if budget < 1 or not names:
        raise SelectionError("a search needs at least one coefficient and one evaluation")
    scorer = scorer_of(evaluator, journal)
    asked = _METHODS.get(method)
    if asked is None:
        raise SelectionError(f"there is no search {method!r}", hint=f"one of {', '.join(_METHODS)}")
    tried: dict[Vector, CoefficientsPoint] = {}
    base = scorer.scores(family(dict.fromkeys(names, 0.0)), rule.splits) if rule.needs_base else None
    search = asked(first, low, high, budget, seed)
    vector = next(search, None)
    repeats = 0
    while vector is not None and len(tried) < budget and repeats < 20 * budget:
        if vector in tried:
            repeats += 1
        else:
            if on_progress:
                on_progress("searching", len(tried), budget)
            numbers = dict(zip(names, vector, strict=True))
            marks = scorer.scores(family(numbers), rule.splits)
            tried[vector] = CoefficientsPoint(numbers, marks, rule.value(marks), rule.allowed(marks, base))
        point = tried[vector]
        try:
            vector = search.send(point.value if point.allowed else None)
        except StopIteration:
            break
    if on_progress:
        on_progress("searching", budget, budget)
    ranks = {v: rule.rank(v, p.scores, base) for v, p in tried.items() if p.allowed}
    if not ranks:
        raise SelectionError(f"no vector tried fits the rule {rule.name}: {rule.says}")
    chosen = tried[max(ranks, key=lambda v: ranks[v] or ())]
    images = {"scored": scorer.scored, "saved": scorer.saved}
    made = family(chosen.coefficients)
    return CoefficientsResult(method, rule, made, chosen.coefficients, chosen, tuple(tried.values()), images)


def _random(first: Vector, low: float, high: float, budget: int, seed: int) -> Search:
    draw = random.Random(seed)
    yield first
    while True:
        yield tuple(round(draw.uniform(low, high), _DIGITS) for _ in first)


def _coordinate(first: Vector, low: float, high: float, budget: int, seed: int) -> Search:
    """Up and down along each coordinate, keeping what helps; half the step when nothing did."""
    here, best = first, (yield first)
    step = (high - low) / 4
    while step >= 10**-_DIGITS:
        moved = False
        for axis in range(len(first)):
            for sign in (1, -1):
                there = _moved(here, axis, sign * step, low, high)
                figure = None if there == here else (yield there)
                while figure is not None and (best is None or figure > best):
                    here, best, moved = there, figure, True
                    there = _moved(here, axis, sign * step, low, high)
                    figure = None if there == here else (yield there)
        if not moved:
            step /= 2


def _moved(here: Vector, axis: int, by: float, low: float, high: float) -> Vector:
    to = round(min(max(here[axis] + by, low), high), _DIGITS)
    return (*here[:axis], to, *here[axis + 1 :])


def _cmaes(first: Vector, low: float, high: float, budget: int, seed: int) -> Search:
    try:
        optuna = import_module("optuna")
        import_module("cmaes")
    except ImportError as error:
        raise MissingExtraError("optuna and cmaes", extra="sweep", what="CMA-ES search") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.CmaEsSampler(seed=seed)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.enqueue_trial({str(i): x for i, x in enumerate(first)})
    while True:
        trial = study.ask()
        vector = tuple(round(trial.suggest_float(str(i), low, high), _DIGITS) for i in range(len(first)))
        figure = yield vector
        if figure is None:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, float(figure))


_METHODS: Mapping[str, Callable[[Vector, float, float, int, int], Search]] = {
    "coordinate": _coordinate,
    "random": _random,
    "cmaes": _cmaes,
}


def _start(start: float | Sequence[float] | None, count: int, low: float, high: float) -> Vector:
    if not low < high:
        raise SelectionError(f"the range of coefficients {low:g} to {high:g} is empty")
    if start is None:
        start = low + (high - low) / max(count, 1)
    vector = (float(start),) * count if isinstance(start, int | float) else tuple(float(x) for x in start)
    if len(vector) != count or not all(low <= x <= high for x in vector):
        raise SelectionError(f"the start {start} does not give {count} coefficients from {low:g} to {high:g}")
    return tuple(round(x, _DIGITS) for x in vector)
