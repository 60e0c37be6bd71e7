"""One coefficient over a grid, and a rule that chooses: WiSE-FT, PAINT, scaling, negation."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipmerge.errors import SelectionError
from clipmerge.search.judge import Judge, Scorer, goodness, mark_document, mcnemar_p, scorer_of
from clipmerge.search.results import Table, chance, percent, plot, span
from clipmerge.search.rules import Rule
from clipmerge.types import Progress
from clipmerge.weights.check import check

if TYPE_CHECKING:
    from clipmerge.search.journal import Journal
    from clipmerge.weights.weights import Weights

Family = Callable[[float], "Weights"]

_GOLDEN = (5**0.5 - 1) / 2
_DIGITS = 4


@dataclass(frozen=True)
class SweepPoint:
    """One coefficient tried.

    Attributes:
        scores: split → Score. value: the rule's figure. allowed: whether the rule may choose it.
        refined: found between grid points.
    """

    alpha: float
    scores: Mapping[str, Any]
    value: Fraction
    allowed: bool = True
    refined: bool = False


@dataclass(frozen=True)
class SweepResult:
    """A sweep and its choice.

    Attributes:
        alpha: the coefficient chosen. weights: the model there. chosen: its point.
        history: every point, by coefficient. base: the point at 0 where it was tried.
    """

    family: str
    rule: Rule
    alpha: float
    weights: "Weights"
    chosen: SweepPoint
    history: tuple[SweepPoint, ...]
    images: Mapping[str, int]

    @property
    def base(self) -> SweepPoint | None:
        return next((point for point in self.history if point.alpha == 0), None)

    def table(self) -> Table:
        """One row a point; the chosen one is marked in words."""
        splits = list(self.chosen.scores)
        headers: tuple[str, ...] = ("alpha" if self.family in {"interpolate", "patch"} else "scale",)
        headers += tuple(cell for split in splits for cell in (split, "95 %", "p"))
        rows = tuple(self._row(point) for point in self.history)
        figure = () if self.rule.largest_allowed else (self.rule.name,)
        return Table((*headers, *figure, ""), rows, f"{self.family}: {self.rule.says}")

    def to_json(self) -> dict[str, Any]:
        """Everything but the weights, ready for `json.dumps`."""
        return {
            "kind": "sweep",
            "family": self.family,
            "rule": rule_document(self.rule),
            "alpha": self.alpha,
            "metric": next(iter(self.chosen.scores.values())).metric,
            "splits": list(self.chosen.scores),
            "points": [self._document(point) for point in self.history],
            "images": dict(self.images),
        }

    def plot(self, path: str | Path) -> list[Path]:
        """Draw the curve with the chosen point and the ends; the files written."""
        return plot(self.to_json(), path)

    def _row(self, point: SweepPoint) -> tuple[str, ...]:
        cells = [f"{point.alpha:g}"]
        for split, mark in point.scores.items():
            cells += [percent(mark.value), span(mark.interval), chance(self._p(point, split))]
        notes = ["chosen"] if point is self.chosen else []
        notes += [] if point.allowed else ["not allowed"]
        notes += ["refined"] if point.refined else []
        if not self.rule.largest_allowed:
            cells.append(percent(float(point.value)))
        return (*cells, ", ".join(notes))

    def _p(self, point: SweepPoint, split: str) -> float | None:
        """McNemar's p of a point against the base."""
        base = self.base
        return None if base is None or base is point else mcnemar_p(base.scores[split], point.scores[split])

    def _document(self, point: SweepPoint) -> dict[str, Any]:
        scores = {split: mark_document(m) | {"p": self._p(point, split)} for split, m in point.scores.items()}
        return {
            "alpha": point.alpha,
            "value": float(point.value),
            "allowed": point.allowed,
            "refined": point.refined,
            "chosen": point is self.chosen,
            "scores": scores,
        }


def sweep(
    family: Family,
    grid: Sequence[float],
    evaluator: Judge | Scorer,
    *,
    rule: Rule,
    refine: bool | float = False,
    name: str = "interpolate",
    splits: Sequence[str] | None = None,
    journal: "Journal | str | os.PathLike[str] | None" = None,
    on_progress: Progress | None = None,
) -> SweepResult:
    """Score `family(alpha)` for each alpha of the grid and choose by the rule.

    Args:
        family: coefficient → weights; at 0 it is the base.
        rule: one of `clipmerge.search.rules`.
        refine: narrow the choice down between the grid's points (golden section; bisection where the rule
            takes the largest allowed) to this width, by default a tenth of the grid's step.
        name: what the family is: "interpolate", "add", "negate", "patch".
        splits: those to score, by default all of the evaluator's; the rule's are always among them.
        journal: a file of scores already paid for, read and appended to.

    Raises:
        SelectionError: an empty grid, a split that the evaluator lacks, or no point that the rule allows.
    """
    scorer = scorer_of(evaluator, journal)
    wanted = tuple(dict.fromkeys([*(splits or scorer.judge.splits), *rule.splits]))
    for split in wanted:
        if split not in scorer.judge.splits:
            scorer.split(split)
            raise SelectionError(f"the rule {rule.name} needs a split named {split!r}")
    check(family(max(map(float, grid), default=0.0)), dtype="F32")
    points = _Points(family, scorer, rule, wanted, on_progress)
    points.run(_alphas(grid, rule))
    if refine:
        _refine(points, float(refine) if refine is not True else points.step() / 10)
    chosen = points.best()
    images = {"scored": scorer.scored, "saved": scorer.saved}
    history = points.sorted()
    return SweepResult(name, rule, chosen.alpha, family(chosen.alpha), chosen, history, images)


class _Points:
    """The points tried so far."""

    def __init__(
        self,
        family: Family,
        scorer: Scorer,
        rule: Rule,
        splits: tuple[str, ...],
        on_progress: Progress | None,
    ) -> None:
        self.family, self.scorer, self.rule, self.splits = family, scorer, rule, splits
        self.on_progress = on_progress
        self.tried: dict[float, SweepPoint] = {}

    def run(self, alphas: Sequence[float]) -> None:
        for done, alpha in enumerate(alphas):
            if self.on_progress:
                self.on_progress("sweeping", done, len(alphas))
            self.at(alpha)
        if self.on_progress:
            self.on_progress("sweeping", len(alphas), len(alphas))

    def at(self, alpha: float, refined: bool = False) -> SweepPoint:
        alpha = round(alpha, _DIGITS) if refined else alpha
        if alpha not in self.tried:
            marks = self.scorer.scores(self.family(alpha), self.splits)
            self.tried[alpha] = SweepPoint(alpha, marks, self.rule.value(marks), True, refined)
            self.judge()
        return self.tried[alpha]

    def judge(self) -> None:
        """Say of every point whether the rule allows it, now that more is known."""
        base = self.tried.get(0.0)
        for alpha, point in self.tried.items():
            allowed = self.rule.allowed(point.scores, base.scores if base else None)
            self.tried[alpha] = point if allowed == point.allowed else replace(point, allowed=allowed)

    def sorted(self) -> tuple[SweepPoint, ...]:
        return tuple(self.tried[alpha] for alpha in sorted(self.tried))

    def best(self) -> SweepPoint:
        base = self.tried.get(0.0)
        ranks = {
            point.alpha: self.rule.rank((point.alpha,), point.scores, base.scores if base else None)
            for point in self.sorted()
        }
        allowed = {alpha: rank for alpha, rank in ranks.items() if rank is not None}
        if not allowed:
            raise SelectionError(f"no coefficient of the grid fits the rule: {self.rule.says}")
        return self.tried[max(allowed, key=allowed.__getitem__)]

    def step(self) -> float:
        alphas = sorted(self.tried)
        return min((b - a for a, b in pairwise(alphas)), default=0.0)

    def around(self, alpha: float) -> tuple[float, float]:
        """The neighbours of a point, or the point itself at an end."""
        alphas = sorted(self.tried)
        where = alphas.index(alpha)
        return alphas[max(where - 1, 0)], alphas[min(where + 1, len(alphas) - 1)]


def _refine(points: _Points, width: float) -> None:
    width = max(width, 10**-_DIGITS)
    if points.rule.largest_allowed:
        _bisect(points, width)
    else:
        _golden(points, width)


def _golden(points: _Points, width: float) -> None:
    """Golden-section search for the rule's largest figure between the best point's neighbours."""
    low, high = points.around(points.best().alpha)
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    while high - low > width:
        if points.at(left, True).value >= points.at(right, True).value:
            high, right = right, left
            left = high - _GOLDEN * (high - low)
        else:
            low, left = left, right
            right = low + _GOLDEN * (high - low)


def _bisect(points: _Points, width: float) -> None:
    """The border between the largest allowed point and the next one of the grid."""
    low = points.best().alpha
    _, high = points.around(low)
    while high - low > width:
        middle = round((low + high) / 2, _DIGITS)
        if not low < middle < high:
            return
        if points.at(middle, True).allowed:
            low = middle
        else:
            high = middle


def _alphas(grid: Sequence[float], rule: Rule) -> list[float]:
    alphas = sorted({float(alpha) for alpha in grid})
    if not alphas:
        raise SelectionError("the grid of coefficients is empty", hint="for example 0:1:0.1")
    if rule.needs_base and 0.0 not in alphas:
        alphas = sorted([0.0, *alphas])
    return alphas


def steps(start: float, stop: float, step: float) -> tuple[float, ...]:
    """start, start + step … stop in exact decimals: `steps(0, 1, 0.1)` holds 0.3."""
    first, last, by = (Decimal(repr(float(x))) for x in (start, stop, step))
    if by <= 0 or last < first:
        grid = f"{start:g}:{stop:g}:{step:g}"
        raise SelectionError(f"the grid {grid} holds nothing", hint="for example 0:1:0.1")
    count = int((last - first) / by) + 1
    return tuple(float(first + index * by) for index in range(count))


def rule_document(rule: Rule) -> dict[str, Any]:
    """A rule for JSON."""
    return {"name": rule.name, "says": rule.says, "roles": {role: list(s) for role, s in rule.roles.items()}}


def reference_scores(
    finetuned: Mapping[str, "Weights"],
    evaluator: Judge | Scorer,
    *,
    journal: "Journal | str | os.PathLike[str] | None" = None,
) -> dict[str, Fraction]:
    """Split → the score on it of that task's own finetuned model, for `normalised_mean`."""
    scorer = scorer_of(evaluator, journal)
    return {split: goodness(scorer.score(weights, split)) for split, weights in finetuned.items()}
