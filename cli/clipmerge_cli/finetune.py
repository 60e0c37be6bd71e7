"""`clipmerge finetune`."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

import typer

from clipmerge.finetuning.settings import Settings
from clipmerge_cli import show
from clipmerge_cli.groups import opt, setting
from clipmerge_cli.options import INPUT, Force, Images, OutputFile, Plot, Talk
from clipmerge_cli.progress import training


def _augment(text: str) -> str | Mapping[str, Any]:
    """Return a JSON object (open_clip's aug-cfg), or the steps as they are."""
    if not text.lstrip().startswith("{"):
        return text
    try:
        return dict(json.loads(text))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not JSON: {error}", param_hint="--augment") from error


def finetune(
    train: Annotated[str, opt("Training images.", INPUT, metavar="DATA")],
    output: OutputFile,
    images: Images,
    settings: Settings,
    talk: Talk,
    base: Annotated[
        str, opt("Where training starts; 'none' trains from scratch.", INPUT, metavar="CKPT")
    ] = "none",
    val: Annotated[str | None, opt("Held-out images, scored on the way.", INPUT, metavar="DATA")] = None,
    head: Annotated[
        str | None, opt("Take classification_head from this checkpoint.", "Method", metavar="CKPT")
    ] = None,
    augment: Annotated[str, setting(Settings, "augment")] = "crop",
    device: Annotated[str, setting(Settings, "device")] = "auto",
    tensorboard: Annotated[str | None, opt("Folder for its log.", "What is kept", metavar="DIR")] = None,
    resume: Annotated[bool, opt("Go on from the saved state.", "What is kept")] = False,
    plot: Plot = None,
    force: Force = False,
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
    aug_cfg = _augment(augment)

    from clipmerge import distributed
    from clipmerge.device import describe, resolve_device, resolve_precision
    from clipmerge.finetuning.finetune import finetune as run_finetuning
    from clipmerge.weights.weights import load

    resolved = resolve_device(device)
    precision = resolve_precision(settings.precision, resolved)
    distributed.start(resolved)
    talk.say(f"training on {describe(resolved, precision)}")
    with training(quiet=talk.quiet or talk.json or not show.is_first()) as (on_progress, on_event):
        weights = run_finetuning(
            None if base == "none" else load(base),
            images.open(train, "train", talk, limit=images.limit),
            val=None if val is None else images.open(val, "val", talk),
            head=None if head is None else load(head),
            out=output,
            model=images.model,
            settings=replace(
                settings,
                augment=aug_cfg,
                device=str(resolved),
                precision=precision,
                templates=images.templates,
            ),
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
