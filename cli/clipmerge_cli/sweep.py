"""`clipmerge sweep`."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from clipmerge.finetuning.settings import Settings
from clipmerge.finetuning.table import MethodName
from clipmerge_cli import show
from clipmerge_cli.groups import opt, setting
from clipmerge_cli.options import INPUT, SEARCH, Images, Talk
from clipmerge_cli.scoring import Precision

if TYPE_CHECKING:
    from clipmerge.finetuning.sweep import Trial

_TRAIN = "Every trial"


def sweep(
    *,
    train: str = opt(..., "Training images.", INPUT, metavar="DATA"),
    val: str = opt(..., "Held-out images.", INPUT, metavar="DATA"),
    output: Path = opt(
        ..., "Folder for the checkpoints, one per trial.", SEARCH, "--output", "-o", metavar="DIR"
    ),
    base: str = opt(..., "Where every trial starts.", INPUT, metavar="CKPT"),
    images: Images,
    talk: Talk,
    trials: int = opt(72, "How many in all.", SEARCH, min=1),
    space: str = opt("soups", "soups (the model-soups paper's), or a TOML file.", SEARCH),
    storage: str | None = opt(
        None, "Optuna's database, shared by workers; by default SQLite in DIR.", SEARCH, metavar="URL"
    ),
    sampler: Literal["random", "tpe"] = opt(
        "random", "How trials are drawn; tpe learns from others.", SEARCH
    ),
    retries: int = opt(2, "How often a trial that dies is tried again.", SEARCH, min=0),
    seed: int = opt(0, "Seed of the draws.", SEARCH),
    method: MethodName | None = opt(
        None, "As in clipmerge finetune; default: the space's (soups: lp-ft).", _TRAIN
    ),
    batch_size: int = setting(Settings, "batch_size", panel=_TRAIN),
    device: str = setting(Settings, "device", "auto", _TRAIN),
    precision: Precision = setting(Settings, "precision", "auto", _TRAIN),
) -> None:
    """Finetune many times over a search space; what is left is ready for a soup.

    \b
    clipmerge sweep --base base.safetensors --train images/train \\
        --val images/val --trials 72 -o runs/
    clipmerge soup runs/trial-*.safetensors --greedy \\
        --val images/val -o soup.safetensors

    Start it as often as you like, on one machine or with a shared --storage on many: each worker takes trials until
    none is left. Killed workers' trials are taken over; called again, a sweep goes on.
    """
    from clipmerge.device import describe, resolve_device, resolve_precision
    from clipmerge.finetuning.space import load_space
    from clipmerge.finetuning.sweep import finetune_sweep, table
    from clipmerge.weights.weights import load

    trial_space = load_space(space)
    if method is not None:
        trial_space = replace(trial_space, fixed={**trial_space.fixed, "method": method})
    resolved = resolve_device(device)
    resolved_precision = resolve_precision(precision, resolved)
    talk.say(f"training on {describe(resolved, resolved_precision)}")

    def say_trial(trial: "Trial", done: int) -> None:
        talk.say(f"{done}/{trials}  {trial.file.name}  held-out {show.percent(trial.score)} %")

    rows = table(
        finetune_sweep(
            None if base == "none" else load(base),
            images.open(train, "train", talk, limit=images.limit),
            images.open(val, "val", talk),
            output,
            trials=trials,
            space=trial_space,
            storage=storage,
            sampler=sampler,
            seed=seed,
            retries=retries,
            on_trial=say_trial,
            model=images.model,
            templates=images.templates,
            batch_size=batch_size,
            device=str(resolved),
            precision=resolved_precision,
        )
    )
    if talk.json:
        show.document(rows)
    else:
        columns = list(rows[0])
        show.table(columns, [[row.get(column) for column in columns] for row in rows])
