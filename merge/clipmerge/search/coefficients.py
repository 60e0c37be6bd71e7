"""Several coefficients at once: one per task, tower or block, found within a budget of evaluations."""

import random
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Literal

from clipmerge.errors import MissingExtraError, SelectionError
from clipmerge.search.results import SweepResult
from clipmerge.search.rules import Rule
from clipmerge.search.sweep import Search, choose_point
from clipmerge.types import Progress
from clipmerge.weights.coefficient import Coefficient, exact
from clipmerge.weights.names import block_of, tower_of
from clipmerge.weights.weights import Source, Weights, as_weights

if TYPE_CHECKING:
    from clipmerge.evaluate.evaluator import Evaluator

Method = Literal["coordinate", "random", "cmaes"]
Per = Literal["task", "tower", "block"]
Group = Literal["model", "tower", "block", "tensor"]
MakeWeights = Callable[[Mapping[str, Fraction]], Weights]
Vector = tuple[float, ...]

_DIGITS = 4


def task_family(
    base: Source, tuned: Mapping[str, Source], per: Per = "task"
) -> tuple[tuple[str, ...], MakeWeights]:
    """Name coefficients, and return what turns numbers for them into base + Σ coefficient · (tuned − base).

    Args:
        per: one coefficient a task, or a task and tower (`cars:visual`), or a task and transformer block
            (`cars:visual.block[3]`); tensors outside the towers' blocks go with their tower.
    """
    start = as_weights(base)
    vectors = {task: as_weights(weights) - start for task, weights in tuned.items()}
    parts = () if per == "task" else groups_of(start.names, per)
    keys = {task: tuple((f"{task}:{part}", part) for part in parts) or ((task, "*"),) for task in tuned}

    def family(numbers: Mapping[str, Fraction]) -> Weights:
        total = start
        for task, vector in vectors.items():
            rules = {part: numbers[name] for name, part in keys[task]}
            total = total + vector * Coefficient.of(rules["*"] if set(rules) == {"*"} else rules)
        return total

    return tuple(name for pairs in keys.values() for name, _ in pairs), family


def groups_of(names: Sequence[str], per: Group) -> tuple[str, ...]:
    """List patterns that cover every name; the first that matches decides.

    Blocks come before what is left of their tower, and `*` (logit scale and the like) comes last.
    """
    if per == "model":
        return ("*",)
    if per == "tensor":
        return tuple(names)
    if per not in ("tower", "block"):
        raise SelectionError(f"there is no grouping {per!r}", hint="model, tower, block or tensor")
    blocks = {(tower_of(name), number) for name in names if (number := block_of(name)) is not None}
    blocks = {(tower, number) for tower, number in blocks if tower in ("visual", "text")}
    fine = tuple(f"{tower}.block[{number}]" for tower, number in sorted(blocks)) if per == "block" else ()
    present = {tower_of(name) for name in names}
    towers = tuple(tower for tower in ("visual", "text", "head") if tower in present)
    return (*fine, *towers, *(("*",) if "other" in present else ()))


def search_coefficients(
    family: MakeWeights,
    names: Sequence[str],
    evaluator: "Evaluator",
    *,
    rule: Rule,
    method: Method = "coordinate",
    budget: int = 60,
    low: float = 0.0,
    high: float = 1.0,
    start: float | Sequence[float] | None = None,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> SweepResult:
    """Search numbers for `names` so that the rule's figure for `family(numbers)` is large.

    With a journal in the evaluator, a search that was killed repeats its steps from it.

    Args:
        method: "coordinate" (a line search along each name in turn, in ever smaller steps), "random"
            (uniform), "cmaes" (covariance matrix adaptation by Optuna, the `sweep` extra).
        budget: models scored; a vector met again costs nothing.
        start: where the search begins, by default 1/len(names) of the range for each.

    Raises:
        SelectionError: no names, no budget, an empty range, or nothing that the rule allows.
        MissingExtraError: "cmaes" without Optuna.
    """
    first = _start(start, len(names), low, high)
    if budget < 1 or not names:
        raise SelectionError("a search needs at least one coefficient and one evaluation")
    if method not in _METHODS:
        raise SelectionError(f"there is no search {method!r}", hint=f"one of {', '.join(_METHODS)}")
    ends = (first, (high,) * len(names))
    with evaluator.together([family(dict(zip(names, map(exact, end), strict=True))) for end in ends]):
        return choose_point(
            "coefficients",
            method,
            family,
            names,
            _METHODS[method](first, low, high, seed),
            evaluator,
            rule=rule,
            splits=rule.splits,
            expected=budget,
            budget=budget,
            on_progress=on_progress,
        )


def _random(first: Vector, low: float, high: float, seed: int) -> Search:
    draw = random.Random(seed)
    yield first
    while True:
        yield tuple(round(draw.uniform(low, high), _DIGITS) for _ in first)


def _coordinate(first: Vector, low: float, high: float, seed: int) -> Search:
    """Step up and down along each coordinate and keep what helps; halve the step when nothing did."""
    here, best = first, (yield first)
    step = (high - low) / 4
    while step >= 10**-_DIGITS:
        moved = False
        for axis in range(len(first)):
            for by in (step, -step):
                while (there := _step(here, axis, by, low, high)) != here:
                    point = yield there
                    if not point.allowed or (best.allowed and point.value <= best.value):
                        break
                    here, best, moved = there, point, True
        if not moved:
            step /= 2


def _step(here: Vector, axis: int, by: float, low: float, high: float) -> Vector:
    to = round(min(max(here[axis] + by, low), high), _DIGITS)
    return (*here[:axis], to, *here[axis + 1 :])


def _cmaes(first: Vector, low: float, high: float, seed: int) -> Search:
    try:
        import cmaes  # noqa: F401  (Optuna's sampler needs it, and would say so only when it is asked)
        import optuna
    except ImportError as error:
        raise MissingExtraError("optuna and cmaes", extra="sweep", what="CMA-ES search") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    sampler = optuna.samplers.CmaEsSampler(seed=seed)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.enqueue_trial({str(i): x for i, x in enumerate(first)})
    while True:
        trial = study.ask()
        vector = tuple(round(trial.suggest_float(str(i), low, high), _DIGITS) for i in range(len(first)))
        point = yield vector
        failed = optuna.trial.TrialState.FAIL
        study.tell(trial, float(point.value) if point.allowed else None, None if point.allowed else failed)


_METHODS: Mapping[str, Callable[[Vector, float, float, int], Search]] = {
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
