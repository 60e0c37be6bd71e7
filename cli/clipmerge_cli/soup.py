"""`clipmerge soup`: uniform, greedy and learned soups."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from clipmerge_cli import show
from clipmerge_cli.options import (
    AllowNonfinite,
    BatchSize,
    Checkpoints,
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
)
from clipmerge_cli.scoring import (
    Fresh,
    Holdout,
    JournalFile,
    Plot,
    Scoring,
    Seed,
    is_first,
    say_score,
    searching,
    show_result,
)
from clipmerge_cli.writing import Writing, plan

if TYPE_CHECKING:
    from clipmerge.weights.weights import Weights

_KIND, _INPUT, _SEARCH = "Kind of soup", "Model and images", "Search"


def soup(
    checkpoints: Checkpoints,
    output: MaybeOutput = None,
    greedy: Annotated[
        bool, typer.Option("--greedy", help="Keep what helps on held-out images.", rich_help_panel=_KIND)
    ] = False,
    learned: Annotated[
        bool, typer.Option("--learned", help="Learn coefficients on held-out images.", rich_help_panel=_KIND)
    ] = False,
    ensemble: Annotated[
        bool,
        typer.Option(
            "--ensemble", help="The greedy ensemble of logits, as a yardstick.", rich_help_panel=_KIND
        ),
    ] = False,
    val: Annotated[
        str | None,
        typer.Option("--val", metavar="DATA", help="Held-out images.", rich_help_panel=_INPUT),
    ] = None,
    model: Model = None,
    templates: Templates = None,
    classnames: Classnames = None,
    holdout: Holdout = None,
    limit: Limit = None,
    skip_bad: SkipBad = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Keep only what raises the score.", rich_help_panel=_SEARCH)
    ] = False,
    order: Annotated[
        str,
        typer.Option("--order", help="Turns: score, given or random.", rich_help_panel=_SEARCH),
    ] = "score",
    per: Annotated[
        str,
        typer.Option("--per", help="Learned: one share a model, block or tensor.", rich_help_panel=_SEARCH),
    ] = "model",
    epochs: Annotated[
        int, typer.Option("--epochs", min=1, help="Learned: passes over the images.", rich_help_panel=_SEARCH)
    ] = 5,
    lr: Annotated[
        float, typer.Option("--lr", help="Learned: AdamW's learning rate.", rich_help_panel=_SEARCH)
    ] = 0.05,
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
    """Average checkpoints into one: all of them (uniform), or those that help on held-out images.

    A greedy soup ranks the checkpoints on the held-out images and adds each in turn to the mean, keeping it
    if the score does not fall. Scores are remembered: a search that was stopped goes on where it was.

    \b
    clipmerge soup ckpts/*.safetensors -o soup.safetensors
    clipmerge soup ckpts/*.safetensors --greedy --val images/val \\
        --model ViT-B-32 -o soup.safetensors
    torchrun --nproc-per-node 8 -m clipmerge soup ckpts/*.safetensors \\
        --greedy --val images/val --device cuda --precision bf16 -o soup.safetensors
    """
    kind = _kind(greedy, learned, ensemble)
    if kind != "uniform" and val is None:
        raise typer.BadParameter("a choice needs held-out images: --val DATA", param_hint="--val")
    if output is None and kind == "uniform" and not dry_run:
        raise typer.BadParameter("say where to write: -o FILE", param_hint="--output")
    if output is not None and kind == "ensemble":
        raise typer.BadParameter("an ensemble is many models, not a file", param_hint="--output")
    if order not in ("score", "given", "random"):
        raise typer.BadParameter(f"{order!r} is not score, given or random", param_hint="--order")
    from clipmerge.weights.weights import load_all

    weights = load_all(checkpoints)
    writing = Writing(
        output, force, dtype, shard_size, allow_nonfinite, threads,
        digests=not no_digests, fsync=fsync, model=model, push_to_hub=push_to_hub,
    )  # fmt: skip
    writing.check(*weights, based=False, output=kind != "uniform" or val is not None)
    if dry_run:
        _plan(weights, writing, kind, json)
    elif kind == "uniform" and val is None:
        _uniform(weights, writing, json, quiet)
    else:
        scoring = Scoring(
            model, templates, classnames, holdout, limit, skip_bad,
            metric, precision, device, batch_size, journal, fresh, quiet,
        )  # fmt: skip
        options = {"order": order, "seed": seed, "strict": strict}
        if kind == "learned":
            options = {"per": per, "epochs": epochs, "lr": lr, "seed": seed, "batch_size": batch_size}
        with searching(device, quiet=quiet or json) as on_progress:
            evaluator = scoring.evaluator({"val": val or ""}, weights, on_progress)
            result = _choose(kind, weights, evaluator, scoring, options, on_progress)
            written = None
            if is_first() and kind != "ensemble":
                written = writing.write(result.weights, _record(result, evaluator), on_progress)
        show_result(result, written, plot, json=json, quiet=quiet)
        if is_first():
            _say(result, quiet)
            writing.finish(written, quiet=quiet)


def _kind(greedy: bool, learned: bool, ensemble: bool) -> str:
    wanted = [name for name, on in (("greedy", greedy), ("learned", learned), ("ensemble", ensemble)) if on]
    if len(wanted) > 1:
        raise typer.BadParameter(f"choose one of --{' and --'.join(wanted)}", param_hint=f"--{wanted[1]}")
    return wanted[0] if wanted else "uniform"


def _uniform(weights: "list[Weights]", writing: Writing, json: bool, quiet: bool) -> None:
    from clipmerge.search.soup import uniform_soup
    from clipmerge_cli.progress import progress

    result = uniform_soup(weights)
    with progress(quiet=quiet or json) as on_progress:
        written = writing.write(result.weights, None, on_progress)
    if json:
        show.document(result.to_json() | {"output": written})
    if written is not None:
        show.say(f"mean of {len(weights)} checkpoints", quiet=quiet)
    writing.finish(written, quiet=quiet)


def _plan(weights: "list[Weights]", writing: Writing, kind: str, json: bool) -> None:
    from clipmerge.search.soup import uniform_soup

    plan(uniform_soup(weights).weights, writing, json=json)
    if kind != "uniform":
        show.say(f"a {kind} soup chooses among these; the plan shows the mean of all of them")


def _choose(
    kind: str,
    weights: "list[Weights]",
    evaluator: Any,
    scoring: Scoring,
    options: dict[str, Any],
    on_progress: Any,
) -> Any:
    if kind == "learned":
        from clipmerge.search.learned import learned_soup

        return learned_soup(weights, evaluator, on_progress=on_progress, **options)
    if kind == "ensemble":
        from clipmerge.search.ensemble import greedy_ensemble

        return greedy_ensemble(weights, evaluator, on_progress=on_progress, **options)
    from clipmerge.search.soup import greedy_soup, uniform_soup

    journal = scoring.open_journal()
    if kind == "uniform":
        return uniform_soup(weights, evaluator, journal=journal)
    return greedy_soup(weights, evaluator, journal=journal, on_progress=on_progress, **options)


def _record(result: Any, evaluator: Any) -> dict[str, Any]:
    score = result.score
    chosen = {
        "by": result.to_json()["kind"],
        "metric": score.metric,
        "value": score.value,
        "n": score.n,
        "data": evaluator.data_key("val"),
        "ingredients": list(result.ingredients),
    }
    return {"model": evaluator.model.to_metadata(), "selection": chosen}


def _say(result: Any, quiet: bool) -> None:
    show.say(f"{len(result.ingredients)} of {len(result.names)} checkpoints", quiet=quiet)
    say_score(result.score, quiet=quiet)
    images = getattr(result, "images", None)
    if images and images["saved"]:
        show.say(f"{images['scored']} images scored, {images['saved']} saved", quiet=quiet)
