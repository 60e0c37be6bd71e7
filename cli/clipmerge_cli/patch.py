"""`clipmerge patch`: PAINT."""

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
    counted,
    splits_of,
)
from clipmerge_cli.writing import Writing, load_models, merge_or_plan

_INPUT, _SEARCH = "Model and images", "Search"
_MODES = ("single", "sequential", "joint", "parallel")


def patch(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model before finetuning.")],
    finetuned: Annotated[
        list[str],
        typer.Argument(metavar="FINETUNED...", help="Finetuned on the patching task, or one a task."),
    ],
    patching: Annotated[
        list[str],
        typer.Option("--patch", metavar="DATA", help="A task to learn; repeat.", rich_help_panel=_INPUT),
    ],
    supported: Annotated[
        list[str],
        typer.Option("--supported", metavar="DATA", help="A task to keep; repeat.", rich_help_panel=_INPUT),
    ],
    output: MaybeOutput = None,
    mode: Annotated[
        str,
        typer.Option(
            "--mode",
            help="single, sequential, joint or parallel; default: by the numbers given.",
            rich_help_panel=_SEARCH,
        ),
    ] = "",
    alphas: Annotated[
        str,
        typer.Option("--alphas", metavar="GRID", help="START:STOP:STEP or a list.", rich_help_panel=_SEARCH),
    ] = "0:1:0.05",
    method: Annotated[
        str,
        typer.Option("--search", help="Parallel: coordinate, random or cmaes.", rich_help_panel=_SEARCH),
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
    """Learn a new task and keep the old ones (PAINT): interpolate towards the finetuned model.

    The alpha chosen has the best mean of held-out score on the supported tasks and on the patching tasks.
    Several tasks: one checkpoint finetuned on all of them (joint), one a task patched in turn (sequential: each
    should have been finetuned from the model patched before it), or all coefficients searched together (parallel).

    \b
    clipmerge patch base.safetensors cars.safetensors --patch cars/val \\
        --supported images/val -o out.safetensors
    clipmerge patch base.safetensors cars.safetensors dtd.safetensors \\
        --mode sequential --patch cars/val --patch dtd/val \\
        --supported images/val -o out.safetensors
    """
    from clipmerge.weights.weights import interpolate

    if mode not in ("", *_MODES):
        raise typer.BadParameter(f"{mode!r} is not one of {', '.join(_MODES)}", param_hint="--mode")
    several = "sequential" if len(finetuned) > 1 else "joint" if len(patching) > 1 else "single"
    grid = numbers(alphas, "--alphas")
    start, *tuned = load_models(base, *finetuned)
    writing = Writing(
        output, force, dtype, shard_size, allow_nonfinite, threads,
        digests=not no_digests, fsync=fsync, model=model, push_to_hub=push_to_hub,
    )  # fmt: skip
    writing.check(start, *tuned)
    data = splits_of(
        [*supported, *patching],
        [*counted("supported", len(supported)), *counted("patch", len(patching))],
    )
    if dry_run:
        merge_or_plan(interpolate(start, tuned[0], grid[-1]), writing, True, json, quiet)
        show.say(f"alpha is chosen among {len(grid)}; the plan shows {grid[-1]:g}", quiet=quiet)
        return
    scoring = Scoring(
        model, templates, classnames, holdout, limit, skip_bad,
        metric, precision, device, batch_size, journal, fresh, quiet,
    )  # fmt: skip

    def search(evaluator: Any, on_progress: Any) -> Any:
        from clipmerge.search.patch import patch as patched

        return patched(
            start,
            tuned,
            evaluator,
            patching=list(data)[len(supported) :],
            supported=list(data)[: len(supported)],
            mode=mode or several,  # type: ignore[arg-type]
            grid=grid,
            refine=refine,
            method=method,  # type: ignore[arg-type]
            budget=budget,
            seed=seed,
            journal=scoring.open_journal(),
            on_progress=on_progress,
        )

    choose(search, data, [start, *tuned], scoring, writing, plot, json=json, quiet=quiet)
