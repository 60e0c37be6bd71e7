"""`clipmerge add`: task addition."""

from typing import Annotated, Any

import typer

from clipmerge_cli import show
from clipmerge_cli.options import (
    AllowNonfinite,
    BatchSize,
    Classnames,
    Device,
    DryRun,
    Dtype,
    Force,
    Fsync,
    Json,
    Limit,
    MaybeOutput,
    Metric,
    Model,
    NoDigests,
    Precision,
    PushToHub,
    Quiet,
    ShardSize,
    SkipBad,
    Templates,
    Threads,
    numbers,
    scale_of,
)
from clipmerge_cli.scoring import (
    Budget,
    Fresh,
    Holdout,
    JournalFile,
    Plot,
    Refine,
    Scoring,
    Seed,
    choose,
    splits_of,
)
from clipmerge_cli.writing import Writing, load_models, merge_or_plan

_INPUT, _SEARCH = "Model and images", "Search"


def add(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model before finetuning.")],
    finetuned: Annotated[
        list[str], typer.Argument(metavar="FINETUNED...", help="One checkpoint, or task-vector file, a task.")
    ],
    output: MaybeOutput = None,
    scale: Annotated[
        str, typer.Option("--scale", metavar="X", help="Multiplies the sum of task vectors; or auto.")
    ] = "0.4",
    val: Annotated[
        list[str] | None,
        typer.Option(
            "--val", metavar="DATA", help="With auto: each task's images, in order.", rich_help_panel=_INPUT
        ),
    ] = None,
    scales: Annotated[
        str,
        typer.Option("--scales", metavar="GRID", help="With auto: scales to try.", rich_help_panel=_SEARCH),
    ] = "0:1:0.05",
    per: Annotated[
        str,
        typer.Option(
            "--per",
            help="With auto: one scale for all, or one a task, tower, block.",
            rich_help_panel=_SEARCH,
        ),
    ] = "all",
    method: Annotated[
        str,
        typer.Option(
            "--search", help="Of several scales: coordinate, random, cmaes.", rich_help_panel=_SEARCH
        ),
    ] = "coordinate",
    model: Model = None,
    templates: Templates = None,
    classnames: Classnames = None,
    holdout: Holdout = None,
    limit: Limit = None,
    skip_bad: SkipBad = False,
    refine: Refine = False,
    budget: Budget = 60,
    seed: Seed = 0,
    journal: JournalFile = None,
    fresh: Fresh = False,
    metric: Metric = "top1",
    precision: Precision = "fp32",
    device: Device = "cpu",
    batch_size: BatchSize = 256,
    plot: Plot = None,
    force: Force = False,
    dtype: Dtype = None,
    shard_size: ShardSize = None,
    allow_nonfinite: AllowNonfinite = False,
    threads: Threads = None,
    no_digests: NoDigests = False,
    fsync: Fsync = False,
    push_to_hub: PushToHub = None,
    dry_run: DryRun = False,
    json: Json = False,
    quiet: Quiet = False,
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
    start, *tuned = load_models(base, *finetuned)
    writing = Writing(
        output, force, dtype, shard_size, allow_nonfinite, threads,
        digests=not no_digests, fsync=fsync, model=model, push_to_hub=push_to_hub,
    )  # fmt: skip
    writing.check(start, *tuned)

    def added(at: float) -> Any:
        return start + sum((w - start for w in tuned[1:]), tuned[0] - start) * at

    if scale != "auto":
        if val:
            raise typer.BadParameter("--val is for --scale auto", param_hint="--val")
        merge_or_plan(added(scale_of(scale)), writing, dry_run, json, quiet)
        return
    if len(val or []) != len(tuned):
        says = f"--scale auto needs one --val for each task: {len(tuned)}, not {len(val or [])}"
        raise typer.BadParameter(says, param_hint="--val")
    if per not in ("all", "task", "tower", "block"):
        raise typer.BadParameter(f"{per!r} is not all, task, tower or block", param_hint="--per")
    if refine and per != "all":
        raise typer.BadParameter(
            "--refine is for one scale; a search refines by itself", param_hint="--refine"
        )
    grid = numbers(scales, "--scales")
    data = splits_of(val or [], [w.checkpoints[-1].name for w in tuned])
    if dry_run:
        merge_or_plan(added(grid[-1]), writing, True, json, quiet)
        show.say(f"the scale is chosen among {len(grid)}; the plan shows {grid[-1]:g}", quiet=quiet)
        return
    scoring = Scoring(
        model, templates, classnames, holdout, limit, skip_bad,
        metric, precision, device, batch_size, journal, fresh, quiet,
    )  # fmt: skip

    def search(evaluator: Any, on_progress: Any) -> Any:
        from clipmerge.search.coefficients import search_coefficients, task_family
        from clipmerge.search.judge import Scorer
        from clipmerge.search.rules import normalised_mean
        from clipmerge.search.sweep import reference_scores, sweep

        own = dict(zip(data, tuned, strict=True))
        scorer = Scorer(evaluator, scoring.open_journal())
        rule = normalised_mean(reference_scores(own, scorer))
        if per == "all":
            return sweep(added, grid, scorer, rule=rule, refine=refine, name="add", on_progress=on_progress)
        names, family = task_family(start, own, per)  # type: ignore[arg-type]
        high = max(grid)
        first = min(max(1 / len(tuned), min(grid)), high)  # each part of a task vector at its task's share
        return search_coefficients(
            family, names, scorer, rule=rule, method=method, budget=budget,  # type: ignore[arg-type]
            low=min(grid), high=high, start=first, seed=seed, on_progress=on_progress,
        )  # fmt: skip

    choose(search, data, [start, *tuned], scoring, writing, plot, json=json, quiet=quiet)
