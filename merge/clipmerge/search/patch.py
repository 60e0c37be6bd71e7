"""PAINT: a finetuned model interpolated into its base until both the new and the old tasks are served.

Source: Ilharco et al. 2022, arXiv 2208.05592.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clipmerge.errors import SelectionError
from clipmerge.search.coefficients import CoefficientsResult, Method, search_coefficients, task_family
from clipmerge.search.judge import Judge, Scorer, scorer_of
from clipmerge.search.results import Table, plot
from clipmerge.search.rules import paint
from clipmerge.search.sweep import SweepResult, steps, sweep
from clipmerge.types import Progress
from clipmerge.weights.weights import Weights, interpolate

if TYPE_CHECKING:
    from clipmerge.search.journal import Journal

Mode = Literal["single", "sequential", "joint", "parallel"]
Finetuned = Weights | Callable[[Weights], Weights]
"""Weights, or (sequential) what makes them from the model patched so far."""


@dataclass(frozen=True)
class PatchResult:
    """A patched model.

    Attributes:
        alpha: the coefficient, or one for each patching task (sequential, parallel).
        steps: the sweeps, one for single and joint, one a task for sequential.
        search: the search over all coefficients (parallel).
    """

    mode: Mode
    weights: Weights
    alpha: float | tuple[float, ...]
    steps: tuple[SweepResult, ...] = ()
    search: CoefficientsResult | None = None

    @property
    def history(self) -> tuple[Any, ...]:
        """Every point tried, in order."""
        if self.search is not None:
            return self.search.history
        return tuple(point for step in self.steps for point in step.history)

    def table(self) -> Table:
        """The sweep's rows; with several sweeps a first column counts them."""
        if self.search is not None:
            return self.search.table()
        tables = [step.table() for step in self.steps]
        if len(tables) == 1:
            return tables[0]
        rows = tuple((str(n), row[0], *row[-2:]) for n, table in enumerate(tables, 1) for row in table.rows)
        return Table(("step", "alpha", "paint", ""), rows, "sequential patching")

    def to_json(self) -> dict[str, Any]:
        """Everything but the weights, ready for `json.dumps`."""
        alpha = list(self.alpha) if isinstance(self.alpha, tuple) else self.alpha
        document: dict[str, Any] = {"kind": "patch", "mode": self.mode, "alpha": alpha}
        document["steps"] = [step.to_json() for step in self.steps]
        if self.search is not None:
            document["search"] = self.search.to_json()
        return document

    def plot(self, path: str | Path) -> list[Path]:
        """Draw supported against patching; the files written."""
        return plot(self.to_json(), path)


def patch(
    base: Weights,
    finetuned: Finetuned | Sequence[Finetuned],
    evaluator: Judge | Scorer,
    *,
    patching: str | Sequence[str] = "patch",
    supported: str | Sequence[str] = "supported",
    mode: Mode = "single",
    grid: Sequence[float] = steps(0, 1, 0.05),
    refine: bool | float = False,
    method: Method = "coordinate",
    budget: int = 60,
    seed: int = 0,
    journal: "Journal | str | os.PathLike[str] | None" = None,
    on_progress: Progress | None = None,
) -> PatchResult:
    """Interpolate finetuned models into the base, by the mean of supported and patching scores.

    Args:
        finetuned: one model (single), the jointly finetuned one (joint), one a patching task (sequential, in
            order; parallel). A callable gets the model patched so far and returns its finetuning.
        patching, supported: the evaluator's splits in these roles.
        grid, refine: as in `sweep`.
        method, budget, seed: how parallel patching searches all coefficients together.

    Raises:
        SelectionError: the mode does not fit the numbers of models and of patching tasks.
    """
    new = (patching,) if isinstance(patching, str) else tuple(patching)
    old = (supported,) if isinstance(supported, str) else tuple(supported)
    models = list(finetuned) if isinstance(finetuned, Sequence) else [finetuned]
    _check(mode, len(models), new)
    scorer = scorer_of(evaluator, journal)
    if mode == "parallel":
        return _parallel(base, models, scorer, new, old, method, budget, seed, on_progress)
    patched, done = base, []
    for turn, model in enumerate(models):
        tuned = model if isinstance(model, Weights) else model(patched)
        so_far = new[: turn + 1] if mode == "sequential" else new
        step = sweep(
            _between(patched, tuned),
            grid,
            scorer,
            rule=paint(so_far, old),
            refine=refine,
            name="patch",
            splits=(*old, *so_far),
            on_progress=on_progress,
        )
        patched = step.weights
        done.append(step)
    alphas = tuple(step.alpha for step in done)
    return PatchResult(mode, patched, alphas if mode == "sequential" else alphas[0], tuple(done))


def _between(a: Weights, b: Weights) -> Callable[[float], Weights]:
    return lambda alpha: interpolate(a, b, alpha)


def _parallel(
    base: Weights,
    models: Sequence[Finetuned],
    scorer: Scorer,
    new: tuple[str, ...],
    old: tuple[str, ...],
    method: Method,
    budget: int,
    seed: int,
    on_progress: Progress | None,
) -> PatchResult:
    tuned = dict(zip(new, (m if isinstance(m, Weights) else m(base) for m in models), strict=True))
    names, family = task_family(base, tuned)
    found = search_coefficients(
        family,
        names,
        scorer,
        rule=paint(new, old),
        method=method,
        budget=budget,
        seed=seed,
        on_progress=on_progress,
    )
    return PatchResult("parallel", found.weights, tuple(found.coefficients.values()), search=found)


def _check(mode: Mode, models: int, new: tuple[str, ...]) -> None:
    if mode not in ("single", "sequential", "joint", "parallel"):
        modes = "single, sequential, joint or parallel"
        raise SelectionError(f"there is no patching mode {mode!r}", hint=modes)
    if mode in ("single", "joint") and models != 1:
        hint = "finetune once on the union for joint, or use sequential or parallel"
        raise SelectionError(f"{mode} patching takes one finetuned checkpoint, not {models}", hint=hint)
    if mode == "single" and len(new) != 1:
        raise SelectionError(f"single patching takes one patching task, not {len(new)}", hint="use joint")
    if mode in ("sequential", "parallel") and models != len(new):
        raise SelectionError(
            f"{mode} patching pairs checkpoints with patching tasks: {models} against {len(new)}",
            hint="give one patching split for each checkpoint, in the same order",
        )
