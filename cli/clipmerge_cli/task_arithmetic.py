"""`clipmerge add`, `negate`, `analogy` and `task-vector`: task arithmetic."""

from typing import TYPE_CHECKING, Any, Literal

import typer

from clipmerge_cli.groups import arg, opt
from clipmerge_cli.options import (
    BASE,
    FINETUNED,
    INPUT,
    REFINE,
    SCALES,
    SEARCH,
    Several,
    named,
    numbers,
    scale_of,
    scale_option,
)
from clipmerge_cli.scoring import Choosing, choose
from clipmerge_cli.writing import Output, load_models

if TYPE_CHECKING:
    from clipmerge.evaluate.evaluator import Evaluator
    from clipmerge.search.results import SweepResult
    from clipmerge.types import Progress
    from clipmerge.weights.coefficient import Scalar
    from clipmerge.weights.weights import Weights


def add(
    *,
    base: str = BASE,
    finetuned: list[str] = arg("FINETUNED...", "One checkpoint, or task-vector file, per task."),
    out: Output,
    choosing: Choosing,
    several: Several,
    scale: str = scale_option("0.4"),
    val: list[str] | None = opt(None, "With auto: each task's images, in order.", INPUT, metavar="DATA"),
    scales: str = SCALES,
    per: Literal["all", "task", "tower", "block"] = opt(
        "all", "With auto: one scale for all, or one per task, tower or block.", SEARCH
    ),
    refine: bool = REFINE,
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
        message = f"--scale auto needs one --val for each task: {tasks}, not {len(val or [])}"
        raise typer.BadParameter(message, param_hint="--val")
    if refine and per != "all":
        raise typer.BadParameter(
            "--refine is for one scale; a search refines by itself", param_hint="--refine"
        )
    start, *tuned = load_models(base, *finetuned)
    splits = named(val or [], "--val", [w.checkpoints[-1].name for w in tuned])

    def at(scale: "Scalar") -> "Weights":
        return start + scale * sum((w - start for w in tuned[1:]), tuned[0] - start)

    def search(evaluator: "Evaluator", on_progress: "Progress | None") -> "SweepResult":
        from clipmerge.search.coefficients import search_coefficients, task_family
        from clipmerge.search.rules import normalised_mean
        from clipmerge.search.sweep import reference_scores, sweep

        models = dict(zip(splits, tuned, strict=True))
        options: dict[str, Any] = {"rule": normalised_mean(reference_scores(models, evaluator))}
        options |= {"on_progress": on_progress}
        if per == "all":
            return sweep(at, grid, evaluator, refine=refine, name="add", **options)
        names, family = task_family(start, models, per)
        low, high = min(grid), max(grid)
        options |= {"low": low, "high": high, **vars(several)}
        options["start"] = min(max(1 / tasks, low), high)  # each part of a task vector at its task's share
        return search_coefficients(family, names, evaluator, **options)

    choose("add", [start, *tuned], at, value, grid, splits, choosing, out, search=search)


def negate(
    *,
    base: str = BASE,
    finetuned: str = arg("FINETUNED", "Finetuned on what to forget, or its task vector."),
    out: Output,
    choosing: Choosing,
    scale: str = scale_option("0.5"),
    target: str | None = opt(None, "With auto: what to forget.", INPUT, metavar="DATA"),
    control: str | None = opt(None, "With auto: what to keep.", INPUT, metavar="DATA"),
    keep: float = opt(0.95, "Share of the base's control score to keep.", SEARCH, min=0, max=1),
    scales: str = SCALES,
    refine: bool = REFINE,
) -> None:
    """Make the base worse at a task and leave the rest alone: base - scale * (finetuned - base).

    With --scale auto the scale is the largest one whose score on the control images stays at or above the
    share --keep of the base's.

    \b
    clipmerge negate base.safetensors cars.safetensors --scale 0.6 \\
        -o no-cars.safetensors
    clipmerge negate base.safetensors cars.safetensors --scale auto \\
        --target cars/val --control images/val -o no-cars.safetensors
    """
    from clipmerge.search.rules import keep_control

    value, grid = scale_of(scale), numbers(scales, "--scales")
    if value is not None and (target or control):
        raise typer.BadParameter("--target and --control are for --scale auto", param_hint="--scale")
    if value is None and not (target and control):
        raise typer.BadParameter("--scale auto needs --target and --control", param_hint="--target")
    start, tuned = load_models(base, finetuned)

    def at(scale: "Scalar") -> "Weights":
        return start - scale * (tuned - start)

    splits, rule = {"target": target or "", "control": control or ""}, keep_control(keep)
    choose("negate", [start, tuned], at, value, grid, splits, choosing, out, rule=rule, refine=refine)


def analogy(
    *,
    base: str = BASE,
    a: str = opt(..., "A of: A is to B as C is to the result.", metavar="A"),
    b: str = opt(..., "B of: A is to B as C is to the result.", metavar="B"),
    c: str = opt(..., "C of: A is to B as C is to the result.", metavar="C"),
    out: Output,
    choosing: Choosing,
    scale: str = scale_option("1.0"),
    val: str | None = opt(None, "With auto: held-out images.", INPUT, metavar="DATA"),
    scales: str = SCALES,
    refine: bool = REFINE,
) -> None:
    """A is to B as C is to the result: base + scale * (C + B - A), all as task vectors.

    \b
    clipmerge analogy base.safetensors --a photo-dogs.safetensors \\
        --b photo-lions.safetensors --c sketch-dogs.safetensors \\
        -o sketch-lions.safetensors
    clipmerge analogy base.safetensors --a A --b B --c C --scale auto \\
        --val images/val -o out.safetensors
    """
    from clipmerge.search.rules import mean_of

    value, grid = scale_of(scale), numbers(scales, "--scales")
    if value is not None and val:
        raise typer.BadParameter("--val is for --scale auto", param_hint="--val")
    if value is None and not val:
        raise typer.BadParameter("--scale auto needs held-out images: --val DATA", param_hint="--val")
    models = load_models(base, a, b, c)
    start, first, second, third = models

    def at(scale: "Scalar") -> "Weights":
        return start + scale * ((third - start) + (second - start) - (first - start))

    splits, rule = {"val": val or ""}, mean_of(["val"])
    choose("analogy", models, at, value, grid, splits, choosing, out, rule=rule, refine=refine)


def task_vector(*, base: str = BASE, finetuned: str = FINETUNED, out: Output) -> None:
    """Write finetuned minus base as a file of its own.

    The file knows that it is a task vector: expressions use it as one, and nothing takes it for a model.

    \b
    clipmerge task-vector zs.safetensors cars.safetensors -o cars.tv.safetensors
    clipmerge merge "zs + 0.4*cars" \\
        zs=zs.safetensors cars=cars.tv.safetensors -o added.safetensors
    """
    from clipmerge.weights.weights import load_all

    start, end = load_all([base, finetuned])
    out.merge(end - start)
