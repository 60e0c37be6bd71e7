"""PAINT: a finetuned model interpolated into its base until both the new and the old tasks are served.

Source: Ilharco et al. 2022, arXiv 2208.05592.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Literal

from clipmerge.errors import SelectionError
from clipmerge.search.coefficients import Method, search_coefficients, task_family
from clipmerge.search.results import SweepResult, count_images
from clipmerge.search.rules import paint
from clipmerge.search.sweep import steps, sweep
from clipmerge.types import Progress
from clipmerge.weights.coefficient import Scalar
from clipmerge.weights.weights import Source, Weights, as_weights, interpolate

if TYPE_CHECKING:
    from clipmerge.evaluate.evaluator import Evaluator

Mode = Literal["single", "sequential", "joint", "parallel"]
Finetuned = Source | Callable[[Weights], Weights]
"""Weights or a path, or (sequential) what makes weights from the model patched so far."""


def patch(
    base: Source,
    finetuned: Finetuned | Sequence[Finetuned],
    evaluator: "Evaluator",
    *,
    patching: str | Sequence[str] = "patch",
    supported: str | Sequence[str] = "supported",
    mode: Mode = "single",
    keep: float | None = None,
    grid: Sequence[Scalar] = steps(0, 1, 0.05),
    refine: bool | float = False,
    method: Method = "coordinate",
    budget: int = 60,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> SweepResult:
    """Interpolate finetuned models into the base, by the mean of supported and patching scores.

    Args:
        finetuned: one model (single), the jointly finetuned one (joint), one a patching task (sequential, in
            order; parallel). A callable gets the model patched so far and returns its finetuning.
        patching, supported: the evaluator's splits in these roles.
        keep: how many points of the base's mean over supported tasks may be lost at most; None: any number.
        grid, refine: as in `sweep`.
        method, budget, seed: how parallel patching searches all coefficients together.

    Returns:
        The last step's choice, with every step in `steps`; `coefficients` has one number for each patching task
        (sequential, parallel), or "alpha".

    Raises:
        SelectionError: the mode does not fit the numbers of models and of patching tasks.
    """
    new = (patching,) if isinstance(patching, str) else tuple(patching)
    old = (supported,) if isinstance(supported, str) else tuple(supported)
    several = isinstance(finetuned, Sequence) and not isinstance(finetuned, str)
    models: list[Finetuned] = list(finetuned) if several else [finetuned]  # type: ignore[arg-type,list-item]
    _check(mode, len(models), new)
    images, patched, done = count_images(evaluator), as_weights(base), list[SweepResult]()
    start = patched
    known = [start, *(as_weights(model) for model in models if not callable(model))]
    with evaluator.together(known):
        if mode == "parallel":
            names, family = task_family(
                patched, {task: _tuned(model, patched) for task, model in zip(new, models, strict=True)}
            )
            rule = paint(new, old, keep=keep)
            done.append(
                search_coefficients(
                    family,
                    names,
                    evaluator,
                    rule=rule,
                    method=method,
                    budget=budget,
                    seed=seed,
                    start=None if keep is None else 0.0,  # the base, which keep always allows
                    on_progress=on_progress,
                )
            )
        for turn, model in enumerate(models if mode != "parallel" else ()):
            tasks = new[: turn + 1] if mode == "sequential" else new
            step = sweep(
                partial(interpolate, patched, _tuned(model, patched)),
                grid,
                evaluator,
                rule=paint(tasks, old, keep=keep),
                refine=refine,
                name="patch",
                splits=(*old, *tasks),
                base=start,  # not the model patched so far: what may be lost must not add up
                on_progress=on_progress,
            )
            patched = step.weights
            done.append(step)
    last = done[-1]
    alphas = [step.coefficient for step in done] if mode == "sequential" else []
    return SweepResult(
        kind="patch",
        name=mode,
        rule=last.rule,
        weights=last.weights,
        coefficients=dict(zip(new, alphas, strict=True)) if alphas else last.coefficients,
        chosen=last.chosen,
        history=tuple(point for step in done for point in step.history),
        images=images(),
        steps=tuple(done),
    )


def _tuned(model: Finetuned, patched: Weights) -> Weights:
    return model(patched) if callable(model) else as_weights(model)


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
