"""One coefficient over a grid, and a rule that chooses: WiSE-FT, PAINT, scaling, negation."""

from collections.abc import Callable, Generator, Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from clipmerge.errors import SelectionError
from clipmerge.search.results import Point, SweepResult, count_images
from clipmerge.search.rules import Rule, Scores, normalised_mean
from clipmerge.types import Progress
from clipmerge.weights.check import check
from clipmerge.weights.coefficient import Scalar, exact
from clipmerge.weights.weights import Source, Weights, as_weights

if TYPE_CHECKING:
    from clipmerge.evaluate.evaluator import Evaluator

MakeWeights = Callable[[Fraction], Weights]
"""Coefficient → model; at 0 it is the base."""

Search = Generator[tuple[Scalar, ...], Point, None]
"""Yields coefficients to try, is sent their point."""

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
    base: Source | None = None,
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
        base: what a rule that keeps something of the base measures against, by default the family at 0.

    Raises:
        SelectionError: an empty grid, a split that the evaluator lacks, or no point that the rule allows.
    """
    numbers = {exact(number) for number in grid}
    if not numbers:
        raise SelectionError("the grid of coefficients is empty", hint="for example 0:1:0.1")
    coefficients = sorted(numbers | {Fraction(0)} if rule.needs_base else numbers)
    check(family(coefficients[-1]), dtype="F32")
    step = min((b - a for a, b in pairwise(coefficients)), default=Fraction(0))
    width = step / 10 if refine is True else Fraction(refine)
    parameter = "alpha" if name in _ALPHA else "scale"
    with evaluator.together([family(coefficient) for coefficient in (coefficients[0], coefficients[-1])]):
        return choose_point(
            "sweep",
            name,
            lambda point: family(point[parameter]),
            (parameter,),
            _try_grid(coefficients, rule, float(width)),
            evaluator,
            rule=rule,
            splits=tuple(dict.fromkeys([*(splits or evaluator.splits), *rule.splits])),
            expected=len(coefficients),
            base=base,
            on_progress=on_progress,
        )


def sweep_scale(
    family: MakeWeights,
    tasks: Mapping[str, Source],
    evaluator: "Evaluator",
    *,
    grid: Sequence[Scalar] | None = None,
    refine: bool | float = False,
    name: str = "add",
    on_progress: Progress | None = None,
) -> SweepResult:
    """Choose the scale with the best mean over tasks of score ÷ score of the task's own finetuned model.

    Equal means take the smaller scale. Any family will do: task addition, or a merging method times a number.

    Args:
        tasks: split → that task's finetuned model.
        grid: as in `sweep`; by default 0, 0.05 … 1.

    Source: Ilharco et al. 2023, arXiv 2212.04089.
    """
    scales = steps(0, 1, 0.05) if grid is None else grid
    with evaluator.together([*map(as_weights, tasks.values()), family(exact(max(scales)))]):
        rule = normalised_mean(reference_scores(tasks, evaluator))
        return sweep(family, scales, evaluator, rule=rule, refine=refine, name=name, on_progress=on_progress)


def choose_point(
    kind: Literal["sweep", "coefficients"],
    name: str,
    family: Callable[[Mapping[str, Fraction]], Weights],
    parameters: Sequence[str],
    search: Search,
    evaluator: "Evaluator",
    *,
    rule: Rule,
    splits: Sequence[str],
    expected: int,
    budget: int | None = None,
    base: Source | None = None,
    on_progress: Progress | None = None,
) -> SweepResult:
    """Score what a search asks for, each point once, and choose among all points by the rule.

    Args:
        expected: how many points there will be, for progress. budget: how many there may be.
        base: as in `sweep`.
    """
    for split in splits:
        evaluator.split_name(split)
    images, what = count_images(evaluator), "sweeping" if kind == "sweep" else "searching"
    tried: dict[tuple[Fraction, ...], Point] = {}
    before: Scores | None = None
    if rule.needs_base:
        start = family(dict.fromkeys(parameters, Fraction(0))) if base is None else base
        before = evaluator.scores(start, splits)
    asked, again = next(search, None), 0
    while asked is not None and (budget is None or (len(tried) < budget and again < 20 * budget)):
        vector = tuple(map(exact, asked))
        again += vector in tried
        if vector not in tried:
            if on_progress:
                on_progress(what, min(len(tried), expected), expected)
            numbers = dict(zip(parameters, vector, strict=True))
            scores = evaluator.scores(family(numbers), splits)
            refined = kind == "sweep" and len(tried) >= expected
            tried[vector] = Point(numbers, scores, rule.value(scores), rule.allowed(scores, before), refined)
        try:
            asked = search.send(tried[vector])
        except StopIteration:
            break
    if on_progress:
        on_progress(what, expected, expected)
    chosen = rule.best(tried.values())
    return SweepResult(
        kind=kind,
        name=name,
        rule=rule,
        weights=family(chosen.coefficients),
        coefficients={parameter: float(number) for parameter, number in chosen.coefficients.items()},
        chosen=chosen,
        history=tuple(tried[vector] for vector in (sorted(tried) if kind == "sweep" else tried)),
        images=images(),
    )


def _try_grid(coefficients: Sequence[Fraction], rule: Rule, width: float) -> Search:
    """Try every coefficient; then, with a width, look closer around the best."""
    points: dict[Fraction, Point] = {}
    for coefficient in coefficients:
        points[coefficient] = yield (coefficient,)
    if width:
        chosen = rule.best(points.values())
        best = next(c for c, point in points.items() if point is chosen)
        where, width = coefficients.index(best), max(width, 10**-_DIGITS)
        low, high = coefficients[max(where - 1, 0)], coefficients[min(where + 1, len(coefficients) - 1)]
        if rule.largest_allowed:
            yield from _bisect(float(best), float(high), width, lambda point: point.allowed)
        elif rule.within is not None:
            border = rule.border(point for point in points.values() if point.allowed)
            yield from _bisect(float(best), float(low), width, lambda point: point.value >= border)
        else:
            yield from _golden(float(low), float(high), width)


def _golden(low: float, high: float, width: float) -> Search:
    """Golden-section search for the largest figure between two coefficients, to four decimals."""
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    while high - low > width:
        point, other = (yield (round(left, _DIGITS),)), (yield (round(right, _DIGITS),))
        if point.value >= other.value:
            high, right = right, left
            left = high - _GOLDEN * (high - low)
        else:
            low, left = left, right
            right = low + _GOLDEN * (high - low)


def _bisect(inside: float, outside: float, width: float, may_be_chosen: Callable[[Point], bool]) -> Search:
    """Find the border between a coefficient that may be chosen and its neighbour on the grid, to four decimals."""
    while abs(outside - inside) > width:
        middle = round((inside + outside) / 2, _DIGITS)
        if not min(inside, outside) < middle < max(inside, outside):
            return
        point = yield (middle,)
        inside, outside = (middle, outside) if may_be_chosen(point) else (inside, middle)


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
