"""One coefficient over a grid, and a rule that chooses: WiSE-FT, PAINT, scaling, negation."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING

from clipmerge.errors import SelectionError
from clipmerge.evaluate.sources import Source
from clipmerge.search.results import Point, SweepResult, count_images
from clipmerge.search.rules import Rule
from clipmerge.types import Progress
from clipmerge.weights.check import check
from clipmerge.weights.coefficient import Scalar, exact
from clipmerge.weights.weights import Weights

if TYPE_CHECKING:
    from clipmerge.evaluate.evaluator import Evaluator

MakeWeights = Callable[[Fraction], Weights]
"""Coefficient → model; at 0 it is the base."""

_GOLDEN = (5**0.5 - 1) / 2
_DIGITS = 4
_ALPHA = ("interpolate", "patch")
"""Families whose coefficient is an interpolation's; that of any other is a scale."""


def sweep(
    family: MakeWeights,
    grid: Sequence[Scalar],
    evaluator: "Evaluator",
    *,
    rule: Rule,
    refine: bool | float = False,
    name: str = "interpolate",
    splits: Sequence[str] | None = None,
    on_progress: Progress | None = None,
) -> SweepResult:
    """Score `family(coefficient)` for each coefficient of the grid and choose by the rule.

    Args:
        family: what makes a model of a coefficient, which it gets exactly; at 0 it is the base.
        grid: numbers; a float counts as the decimal that it prints as.
        rule: one of `clipmerge.search.rules`.
        refine: narrow the choice down between the grid's points (golden section; bisection where the rule
            takes the largest allowed) to this width, by default a tenth of the grid's step.
        name: what the family is: "interpolate", "add", "negate", "patch".
        splits: those to score, by default all of the evaluator's; the rule's are always among them.

    Raises:
        SelectionError: an empty grid, a split that the evaluator lacks, or no point that the rule allows.
    """
    coefficients = _coefficients(grid, rule)
    wanted = tuple(dict.fromkeys([*(splits or evaluator.splits), *rule.splits]))
    for split in wanted:
        evaluator.split_name(split)
    check(family(coefficients[-1]), dtype="F32")
    images = count_images(evaluator)
    points = _Points(family, evaluator, rule, wanted, "alpha" if name in _ALPHA else "scale")
    for done, coefficient in enumerate(coefficients):
        if on_progress:
            on_progress("sweeping", done, len(coefficients))
        points.at(coefficient)
    if on_progress:
        on_progress("sweeping", len(coefficients), len(coefficients))
    if refine:
        width = float(points.step()) / 10 if refine is True else float(refine)
        narrow = _bisect if rule.largest_allowed else _golden
        narrow(points, max(width, 10**-_DIGITS))
    chosen = points.best()
    return SweepResult(
        kind="sweep",
        name=name,
        rule=rule,
        weights=family(chosen),
        coefficients={points.parameter: float(chosen)},
        chosen=points.tried[chosen],
        history=points.sorted(),
        images=images(),
    )


class _Points:
    """The points tried so far, by exact coefficient."""

    def __init__(
        self,
        family: MakeWeights,
        evaluator: "Evaluator",
        rule: Rule,
        splits: tuple[str, ...],
        parameter: str,
    ) -> None:
        self.family, self.evaluator, self.rule, self.splits = family, evaluator, rule, splits
        self.parameter = parameter
        self.tried: dict[Fraction, Point] = {}

    def at(self, coefficient: Fraction, *, refined: bool = False) -> Point:
        """Score one coefficient, and say of every point whether the rule allows it, now that more is known."""
        if coefficient not in self.tried:
            scores = self.evaluator.scores(self.family(coefficient), self.splits)
            value = self.rule.value(scores)
            self.tried[coefficient] = Point({self.parameter: coefficient}, scores, value, True, refined)
            base = self.tried.get(Fraction(0))
            for other, point in self.tried.items():
                allowed = self.rule.allowed(point.scores, base.scores if base else None)
                self.tried[other] = point if allowed == point.allowed else replace(point, allowed=allowed)
        return self.tried[coefficient]

    def near(self, coefficient: float) -> Point:
        """Score a coefficient between grid points, to four decimals."""
        return self.at(exact(round(coefficient, _DIGITS)), refined=True)

    def sorted(self) -> tuple[Point, ...]:
        return tuple(self.tried[coefficient] for coefficient in sorted(self.tried))

    def best(self) -> Fraction:
        allowed = [coefficient for coefficient in sorted(self.tried) if self.tried[coefficient].allowed]
        if not allowed:
            raise SelectionError(f"no coefficient of the grid fits the rule: {self.rule.says}")
        return max(
            allowed, key=lambda coefficient: self.rule.rank((coefficient,), self.tried[coefficient].value)
        )

    def step(self) -> Fraction:
        return min((b - a for a, b in pairwise(sorted(self.tried))), default=Fraction(0))

    def around(self, coefficient: Fraction) -> tuple[float, float]:
        """Return the neighbours of a point, or the point itself at an end."""
        tried = sorted(self.tried)
        where = tried.index(coefficient)
        return float(tried[max(where - 1, 0)]), float(tried[min(where + 1, len(tried) - 1)])


def _golden(points: _Points, width: float) -> None:
    """Golden-section search for the rule's largest figure between the best point's neighbours."""
    low, high = points.around(points.best())
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    while high - low > width:
        if points.near(left).value >= points.near(right).value:
            high, right = right, left
            left = high - _GOLDEN * (high - low)
        else:
            low, left = left, right
            right = low + _GOLDEN * (high - low)


def _bisect(points: _Points, width: float) -> None:
    """Find the border between the largest allowed point and the next one of the grid."""
    best = points.best()
    low, (_, high) = float(best), points.around(best)
    while high - low > width:
        middle = round((low + high) / 2, _DIGITS)
        if not low < middle < high:
            return
        if points.near(middle).allowed:
            low = middle
        else:
            high = middle


def _coefficients(grid: Sequence[Scalar], rule: Rule) -> list[Fraction]:
    numbers = {exact(number) for number in grid}
    if not numbers:
        raise SelectionError("the grid of coefficients is empty", hint="for example 0:1:0.1")
    return sorted(numbers | {Fraction(0)} if rule.needs_base else numbers)


def steps(start: Scalar, stop: Scalar, step: Scalar) -> tuple[Fraction, ...]:
    """List start, start + step … stop, exactly: `steps(0, 1, 0.1)` holds 3/10."""
    first, last, by = (exact(number) for number in (start, stop, step))
    if by <= 0 or last < first:
        grid = f"{float(first):g}:{float(last):g}:{float(by):g}"
        raise SelectionError(f"the grid {grid} holds nothing", hint="for example 0:1:0.1")
    return tuple(first + index * by for index in range(int((last - first) / by) + 1))


def reference_scores(finetuned: Mapping[str, Source], evaluator: "Evaluator") -> dict[str, Fraction]:
    """Score each split's own finetuned model on it, for `normalised_mean`."""
    return {split: evaluator.score(weights, split).figure for split, weights in finetuned.items()}
