"""`clipmerge analogy`: A is to B as C is to what is written."""

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


def analogy(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model before finetuning.")],
    a: Annotated[str, typer.Option("--a", metavar="A", help="A is to B …")],
    b: Annotated[str, typer.Option("--b", metavar="B", help="… as …")],
    c: Annotated[str, typer.Option("--c", metavar="C", help="… C is to the result.")],
    output: MaybeOutput = None,
    scale: Annotated[
        str, typer.Option("--scale", metavar="X", help="Multiplies the task vectors; or auto.")
    ] = "1.0",
    val: Annotated[
        str | None,
        typer.Option("--val", metavar="DATA", help="With auto: held-out images.", rich_help_panel=_INPUT),
    ] = None,
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
    """A is to B as C is to the result: base + scale * (C + B - A), all as task vectors.

    \b
    clipmerge analogy base.safetensors --a photo-dogs.safetensors \\
        --b photo-lions.safetensors --c sketch-dogs.safetensors \\
        -o sketch-lions.safetensors
    clipmerge analogy base.safetensors --a A --b B --c C --scale auto \\
        --val images/val -o out.safetensors
    """
    start, first, second, third = load_models(base, a, b, c)
    writing = Writing(
        output, force, dtype, shard_size, allow_nonfinite, threads,
        digests=not no_digests, fsync=fsync, model=model, push_to_hub=push_to_hub,
    )  # fmt: skip
    writing.check(start, first, second, third)

    def solved(at: float) -> Any:
        return start + ((third - start) + (second - start) - (first - start)) * at

    if scale != "auto":
        if val:
            raise typer.BadParameter("--val is for --scale auto", param_hint="--val")
        merge_or_plan(solved(scale_of(scale)), writing, dry_run, json, quiet)
        return
    if not val:
        raise typer.BadParameter("--scale auto needs held-out images: --val DATA", param_hint="--val")
    grid = numbers(scales, "--scales")
    if dry_run:
        merge_or_plan(solved(grid[-1]), writing, True, json, quiet)
        show.say(f"the scale is chosen among {len(grid)}; the plan shows {grid[-1]:g}", quiet=quiet)
        return
    scoring = Scoring(
        model, templates, classnames, holdout, limit, skip_bad,
        metric, precision, device, batch_size, journal, fresh, quiet,
    )  # fmt: skip

    def search(evaluator: Any, on_progress: Any) -> Any:
        from clipmerge.search.rules import mean_of
        from clipmerge.search.sweep import sweep

        return sweep(
            solved,
            grid,
            evaluator,
            rule=mean_of(["val"]),
            refine=refine,
            name="analogy",
            journal=scoring.open_journal(),
            on_progress=on_progress,
        )

    used = [start, first, second, third]
    choose(search, {"val": val}, used, scoring, writing, plot, json=json, quiet=quiet)
