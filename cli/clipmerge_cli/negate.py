"""`clipmerge negate`: forgetting by negation."""

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
    Fresh,
    Holdout,
    JournalFile,
    Plot,
    Refine,
    Scoring,
    choose,
)
from clipmerge_cli.writing import Writing, load_models, merge_or_plan

_INPUT, _SEARCH = "Model and images", "Search"


def negate(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model before finetuning.")],
    finetuned: Annotated[
        str, typer.Argument(metavar="FINETUNED", help="Finetuned on what to forget, or its task vector.")
    ],
    output: MaybeOutput = None,
    scale: Annotated[
        str, typer.Option("--scale", metavar="X", help="Multiplies the task vector; or auto.")
    ] = "0.5",
    target: Annotated[
        str | None,
        typer.Option("--target", metavar="DATA", help="With auto: what to forget.", rich_help_panel=_INPUT),
    ] = None,
    control: Annotated[
        str | None,
        typer.Option("--control", metavar="DATA", help="With auto: what to keep.", rich_help_panel=_INPUT),
    ] = None,
    keep: Annotated[
        float,
        typer.Option(
            "--keep", min=0, max=1, help="Share of the base's control score to keep.", rich_help_panel=_SEARCH
        ),
    ] = 0.95,
    scales: Annotated[
        str,
        typer.Option("--scales", metavar="GRID", help="With auto: scales to try.", rich_help_panel=_SEARCH),
    ] = "0:1:0.05",
    model: Model = None,
    templates: Templates = None,
    classnames: Classnames = None,
    holdout: Holdout = None,
    limit: Limit = None,
    skip_bad: SkipBad = False,
    refine: Refine = False,
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
    """Make the base worse at a task and leave the rest alone: base - scale * (finetuned - base).

    With --scale auto the scale is the largest one whose score on the control images stays at or above the
    share --keep of the base's.

    \b
    clipmerge negate base.safetensors cars.safetensors --scale 0.6 \\
        -o no-cars.safetensors
    clipmerge negate base.safetensors cars.safetensors --scale auto \\
        --target cars/val --control images/val -o no-cars.safetensors
    """
    start, tuned = load_models(base, finetuned)
    writing = Writing(
        output, force, dtype, shard_size, allow_nonfinite, threads,
        digests=not no_digests, fsync=fsync, model=model, push_to_hub=push_to_hub,
    )  # fmt: skip
    writing.check(start, tuned)

    def negated(at: float) -> Any:
        return start - (tuned - start) * at

    if scale != "auto":
        if target or control:
            raise typer.BadParameter("--target and --control are for --scale auto", param_hint="--scale")
        merge_or_plan(negated(scale_of(scale)), writing, dry_run, json, quiet)
        return
    if not target or not control:
        raise typer.BadParameter("--scale auto needs --target and --control", param_hint="--target")
    grid = numbers(scales, "--scales")
    if dry_run:
        merge_or_plan(negated(grid[-1]), writing, True, json, quiet)
        show.say(f"the scale is chosen among {len(grid)}; the plan shows {grid[-1]:g}", quiet=quiet)
        return
    scoring = Scoring(
        model, templates, classnames, holdout, limit, skip_bad,
        metric, precision, device, batch_size, journal, fresh, quiet,
    )  # fmt: skip

    def search(evaluator: Any, on_progress: Any) -> Any:
        from clipmerge.search.rules import keep_control
        from clipmerge.search.sweep import sweep

        return sweep(
            negated,
            grid,
            evaluator,
            rule=keep_control(keep),
            refine=refine,
            name="negate",
            journal=scoring.open_journal(),
            on_progress=on_progress,
        )

    data = {"target": target, "control": control}
    choose(search, data, [start, tuned], scoring, writing, plot, json=json, quiet=quiet)
