"""`clipmerge add`: task addition."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from clipmerge_cli.groups import opt
from clipmerge_cli.options import (
    INPUT,
    SEARCH,
    Base,
    Refine,
    Scale,
    Scales,
    Several,
    named,
    numbers,
    scale_of,
)
from clipmerge_cli.scoring import Choosing, choose
from clipmerge_cli.writing import Output, load_models

if TYPE_CHECKING:
    from clipmerge.evaluate.evaluator import Evaluator
    from clipmerge.types import Progress
    from clipmerge.weights.coefficient import Scalar
    from clipmerge.weights.weights import Weights


def add(
    base: Base,
    finetuned: Annotated[
        list[str],
        typer.Argument(metavar="FINETUNED...", help="One checkpoint, or task-vector file, per task."),
    ],
    out: Output,
    choosing: Choosing,
    several: Several,
    scale: Scale = "0.4",
    val: Annotated[
        list[str] | None, opt("With auto: each task's images, in order.", INPUT, metavar="DATA")
    ] = None,
    scales: Scales = "0:1:0.05",
    per: Annotated[
        Literal["all", "task", "tower", "block"],
        opt("With auto: one scale for all, or one per task, tower or block.", SEARCH),
    ] = "all",
    refine: Refine = False,
) -> None:
    """Add what finetuned checkpoints learned to their base: base + scale * sum of (finetuned - base).

    With --scale auto the scale is the one with the best mean, over tasks, of held-out score divided by the
    score of that task's own checkpoint; equal means take the smaller scale.

    \b
    clipmerge add base.safetensors cars.safetensors dtd.safetensors \\
        --scale 0.4 -o both.safetensors
    clipmerge add base.safetensors cars.safetensors dtd.safetensors --scale auto \\
        --val cars/val --val dtd/val -o both.safetensors
    """
    value, grid, tasks = scale_of(scale), numbers(scales, "--scales"), len(finetuned)
    if value is not None and val:
        raise typer.BadParameter("--val is for --scale auto", param_hint="--val")
    if value is None and len(val or []) != tasks:
        raise typer.BadParameter(
            f"--scale auto needs one --val for each task: {tasks}, not {len(val or [])}", param_hint="--val"
        )
    if refine and per != "all":
        raise typer.BadParameter(
            "--refine is for one scale; a search refines by itself", param_hint="--refine"
        )
    start, *tuned = load_models(base, *finetuned)
    splits = named(val or [], "--val", [w.checkpoints[-1].name for w in tuned])

    def at(scale: "Scalar") -> "Weights":
        return start + scale * sum((w - start for w in tuned[1:]), tuned[0] - start)

    def search(evaluator: "Evaluator", on_progress: "Progress | None") -> Any:
        from clipmerge.search.coefficients import search_coefficients, task_family
        from clipmerge.search.rules import normalised_mean
        from clipmerge.search.sweep import reference_scores, sweep

        models = dict(zip(splits, tuned, strict=True))
        options: dict[str, Any] = {"on_progress": on_progress}
        rule = normalised_mean(reference_scores(models, evaluator))
        if per == "all":
            return sweep(at, grid, evaluator, rule=rule, refine=refine, name="add", **options)
        names, family = task_family(start, models, per)
        low, high = min(grid), max(grid)
        first = min(max(1 / tasks, low), high)  # each part of a task vector at its task's share
        options |= {"low": low, "high": high, "start": first, **vars(several)}
        return search_coefficients(family, names, evaluator, rule=rule, **options)

    choose("add", [start, *tuned], at, value, grid, splits, choosing, out, search=search)
