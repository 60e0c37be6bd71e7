"""`clipmerge finetune`."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import typer

from clipmerge.finetuning.settings import Settings
from clipmerge_cli import show
from clipmerge_cli.groups import opt, setting
from clipmerge_cli.options import FORCE, INPUT, PLOT, Images, Talk, output_option
from clipmerge_cli.progress import training
from clipmerge_cli.scoring import Precision


def _augment(text: str) -> str | Mapping[str, Any]:
    """Return a JSON object (open_clip's aug-cfg), or the steps as they are."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        return dict(json.loads(text))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not JSON: {error}", param_hint="--augment") from error


def finetune(
    *,
    train: str = opt(..., "Training images.", INPUT, metavar="DATA"),
    output: Path = output_option(...),
    images: Images,
    settings: Settings,
    talk: Talk,
    base: str = opt("none", "Where training starts; 'none' trains from scratch.", INPUT, metavar="CKPT"),
    val: str | None = opt(None, "Held-out images, scored on the way.", INPUT, metavar="DATA"),
    head: str | None = opt(None, "Take classification_head from this checkpoint.", "Method", metavar="CKPT"),
    augment: str = setting(Settings, "augment"),
    device: str = setting(Settings, "device", "auto"),
    precision: Precision = setting(Settings, "precision", "auto"),
    tensorboard: Path | None = opt(None, "Folder for its log.", "What is kept", metavar="DIR"),
    resume: bool = opt(False, "Go on from the saved state.", "What is kept"),
    plot: Path | None = PLOT,
    force: bool = FORCE,
) -> None:
    """Finetune a CLIP model on labelled images; what is written is ready for soup, interpolate and patch.

    \b
    clipmerge finetune --base base.safetensors --train images/train \\
        --val images/val -o ft.safetensors
    clipmerge finetune --base base.safetensors --train digits \\
        --method lp-ft --epochs 5 -o lpft.safetensors
    torchrun --nproc-per-node 8 -m clipmerge finetune \\
        --base … --train … -o ft.safetensors

    Killed? The same command with --resume goes on to the same bytes. DATA is a folder of class folders, a .npz,
    a CSV, WebDataset shards, Parquet, torchvision:NAME:ROOT, or digits.
    """
    from clipmerge import distributed
    from clipmerge.device import describe, resolve_device, resolve_precision
    from clipmerge.finetuning.finetune import finetune as run_finetuning
    from clipmerge.weights.weights import load

    resolved = resolve_device(device)
    computing = resolve_precision(precision, resolved)
    settings = replace(
        settings,
        augment=_augment(augment),
        device=str(resolved),
        precision=computing,
        templates=images.templates,
    )
    distributed.start(resolved)
    talk.say(f"training on {describe(resolved, computing)}")
    with training(quiet=talk.quiet or talk.json or not show.is_first()) as (on_progress, on_event):
        weights = run_finetuning(
            None if base == "none" else load(base),
            images.open(train, "train", talk, limit=images.limit),
            val=None if val is None else images.open(val, "val", talk),
            head=None if head is None else load(head),
            out=output,
            model=images.model,
            settings=settings,
            resume=resume,
            tensorboard=tensorboard,
            force=force,
            on_progress=on_progress,
            on_event=on_event,
        )
    if show.is_first():
        if plot is not None:
            from clipmerge.finetuning.log import read
            from clipmerge.report import figures

            figures.training(read(output.with_name(f"{output.stem}.log.jsonl")), plot)
        if talk.json:
            show.document({"file": output, "training": weights.record.get("training", {})})
        talk.say(f"wrote {show.short(output)}")
    distributed.finish()
