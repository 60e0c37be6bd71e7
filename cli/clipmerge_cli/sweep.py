"""`clipmerge sweep`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from clipmerge_cli.options import Classnames, Json, Limit, Model, Quiet, SkipBad, Templates

_DATA, _SEARCH, _TRAIN = "Model and images", "Search", "Every trial"


def _option(*names: str, panel: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


def sweep(
    train: Annotated[str, _option("--train", panel=_DATA, metavar="DATA", help="Training images.")],
    val: Annotated[str, _option("--val", panel=_DATA, metavar="DATA", help="Held-out images.")],
    output: Annotated[Path, _option("--output", "-o", panel=_SEARCH, metavar="DIR", help="One checkpoint a trial.")],
    base: Annotated[str, _option("--base", panel=_DATA, metavar="CKPT", help="Where every trial starts.")],
    model: Model = None,
    templates: Templates = None,
    classnames: Classnames = None,
    limit: Limit = None,
    skip_bad: SkipBad = False,
    trials: Annotated[int, _option("--trials", panel=_SEARCH, min=1, help="How many in all.")] = 72,
    space: Annotated[str, _option("--space", panel=_SEARCH,
        help="soups (the model-soups paper's), or a TOML file.")] = "soups",
    storage: Annotated[str | None, _option("--storage", panel=_SEARCH, metavar="URL",
        help="Optuna's database, shared by workers; by default SQLite in DIR.")] = None,
    sampler: Annotated[str, _option("--sampler", panel=_SEARCH, help="random or tpe.")] = "random",
    retries: Annotated[int, _option("--retries", panel=_SEARCH, min=0, help="Of a trial that dies.")] = 2,
    seed: Annotated[int, _option("--seed", panel=_SEARCH, help="Of the draws.")] = 0,
    method: Annotated[str | None, _option("--method", panel=_TRAIN,
        help="As in clipmerge finetune; soups: lp-ft.")] = None,
    batch_size: Annotated[int, _option("--batch-size", panel=_TRAIN, min=1, help="Images of a step.")] = 512,
    device: Annotated[str | None, _option("--device", panel=_TRAIN, help="By default the GPU if there is one.")] = None,
    precision: Annotated[str, _option("--precision", panel=_TRAIN, help="fp32, bf16 or fp16.")] = "fp32",
    json: Json = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
    """Finetune many times over a search space; what is left is ready for a soup.

    \b
    clipmerge sweep --base base.safetensors --train images/train \\
        --val images/val --trials 72 -o runs/
    clipmerge soup runs/trial-*.safetensors --greedy \\
        --val images/val -o soup.safetensors

    Start it as often as you like, on one machine or with a shared --storage on many: each worker takes trials until
    none is left. Killed workers' trials are taken over; called again, a sweep goes on.
    """
    from dataclasses import replace

    from clipmerge.data.open import open_split
    from clipmerge.finetuning.space import load_space
    from clipmerge.finetuning.trials import Trial, finetune_sweep, table
    from clipmerge.weights.weights import load
    from clipmerge_cli import show

    found = load_space(space)
    if method is not None:
        found = replace(found, fixed={**found.fixed, "method": method})

    def told(trial: Trial, done: int) -> None:
        show.say(
            f"{done}/{trials}  {trial.file.name}  held-out {100 * trial.score:.2f} %", quiet=quiet or json
        )

    def opened(text: str, role: str, limit: int | None = None) -> Any:
        split = open_split(text, role=role, classnames=classnames, limit=limit, skip_bad=skip_bad)
        show.left_out(split.source, split.skipped, len(split), quiet=quiet)
        return split

    rows = table(
        finetune_sweep(
            None if base == "none" else load(base),
            opened(train, "train", limit),
            opened(val, "val"),
            output,
            trials=trials,
            space=found,
            storage=storage,
            sampler=sampler,
            seed=seed,
            retries=retries,
            on_trial=told,
            model=model,
            templates=templates,
            batch_size=batch_size,
            device=device,
            precision=precision,
        )
    )
    if json:
        show.document(rows)
    else:
        columns = list(rows[0])
        show.table(columns, [[row.get(column) for column in columns] for row in rows])
