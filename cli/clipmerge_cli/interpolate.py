"""`clipmerge interpolate`: between two checkpoints, at one place or along a curve."""

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
    Fresh,
    Holdout,
    JournalFile,
    Plot,
    Refine,
    Scoring,
    choose,
    splits_of,
)
from clipmerge_cli.writing import Writing, load_models, merge_or_plan

_INPUT, _SEARCH = "Model and images", "Search"


def interpolate(
    base: Annotated[str, typer.Argument(metavar="BASE", help="The model before finetuning.")],
    finetuned: Annotated[str, typer.Argument(metavar="FINETUNED", help="The model after finetuning.")],
    output: MaybeOutput = None,
    alpha: Annotated[
        float | None, typer.Option("--alpha", help="0 is BASE, 1 is FINETUNED; default 0.5 without --eval.")
    ] = None,
    alphas: Annotated[
        str | None,
        typer.Option("--alphas", metavar="GRID", help="START:STOP:STEP or a list.", rich_help_panel=_SEARCH),
    ] = None,
    eval: Annotated[
        list[str] | None,
        typer.Option(
            "--eval",
            metavar="NAME=DATA",
            help="Images to score on; `id` (or the first) is in-distribution, the others are shifts.",
            rich_help_panel=_INPUT,
        ),
    ] = None,
    rule: Annotated[
        str | None,
        typer.Option("--rule", help="best-mean (of id and shifts) or best-id.", rich_help_panel=_SEARCH),
    ] = None,
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
    """Interpolate between a base and a finetuned checkpoint (WiSE-FT): (1 - alpha) base + alpha finetuned.

    With --alphas and --eval every alpha is scored, the curve is shown, and the alpha that the rule chooses is
    written. Without images to score on, alpha is 0.5.

    \b
    clipmerge interpolate base.safetensors ft.safetensors --alpha 0.5 \\
        -o out.safetensors
    clipmerge interpolate base.safetensors ft.safetensors --alphas 0:1:0.1 \\
        --eval id=images/val --eval shift=sketches/val \\
        --plot curve.png -o out.safetensors
    """
    from clipmerge.weights.weights import interpolate as between

    if alpha is not None and (alphas or eval):
        raise typer.BadParameter("give --alpha, or --alphas with --eval", param_hint="--alpha")
    if alphas and not eval:
        raise typer.BadParameter("a choice needs images: --eval NAME=DATA", param_hint="--eval")
    grid = numbers(alphas or "0:1:0.1", "--alphas")
    start, end = load_models(base, finetuned)
    writing = Writing(
        output, force, dtype, shard_size, allow_nonfinite, threads,
        digests=not no_digests, fsync=fsync, model=model, push_to_hub=push_to_hub,
    )  # fmt: skip
    writing.check(start, end)
    if not eval:
        merge_or_plan(between(start, end, 0.5 if alpha is None else alpha), writing, dry_run, json, quiet)
        if alpha is not None and not 0 <= alpha <= 1:
            show.say(f"alpha {alpha:g} lies beyond the two models: this extrapolates", quiet=quiet)
        return
    data = splits_of(eval, ["id", *(f"shift{i}" for i in range(1, len(eval)))])
    if dry_run:
        merge_or_plan(between(start, end, 0.5), writing, True, json, quiet)
        show.say(f"alpha is one of {len(grid)}; the plan shows 0.5", quiet=quiet)
        return
    scoring = Scoring(
        model, templates, classnames, holdout, limit, skip_bad,
        metric, precision, device, batch_size, journal, fresh, quiet,
    )  # fmt: skip

    def search(evaluator: Any, on_progress: Any) -> Any:
        from clipmerge.search.sweep import sweep

        return sweep(
            lambda at: between(start, end, at),
            grid,
            evaluator,
            rule=_rule(rule, list(data)),
            refine=refine,
            name="interpolate",
            journal=scoring.open_journal(),
            on_progress=on_progress,
        )

    _rule(rule, list(data))
    choose(search, data, [start, end], scoring, writing, plot, json=json, quiet=quiet)


def _rule(wanted: str | None, splits: list[str]) -> Any:
    from clipmerge.search.rules import best_id, best_mean

    id = "id" if "id" in splits else splits[0]
    shifts = [name for name in splits if name != id]
    name = wanted or ("best-mean" if shifts else "best-id")
    if name == "best-id":
        return best_id(id)
    if name != "best-mean":
        raise typer.BadParameter(f"{name!r} is not best-mean or best-id", param_hint="--rule")
    if not shifts:
        raise typer.BadParameter("best-mean needs a shift: a second --eval NAME=DATA", param_hint="--rule")
    return best_mean(id, shifts)
