"""`clipmerge finetune`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from clipmerge_cli.options import Classnames, Force, Json, Limit, Model, Output, Quiet, SkipBad, Templates
from clipmerge_cli.scoring import Plot

_DATA, _METHOD, _OPTIMISER = "Model and images", "Method", "Optimiser"
_SPEED, _KEEP = "Device", "What is kept"


class Methods(StrEnum):
    flyp = "flyp"
    ce = "ce"
    car_ft = "car-ft"
    lp_ft = "lp-ft"
    linear_probe = "linear-probe"


class Towers(StrEnum):
    both = "both"
    image = "image"
    text = "text"


class Decay(StrEnum):
    all = "all"
    matrices = "matrices"


class Scale(StrEnum):
    learned = "learned"
    clamped = "clamped"
    frozen = "frozen"


class Precisions(StrEnum):
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class Select(StrEnum):
    last = "last"
    best = "best"


class SelectBy(StrEnum):
    top1 = "top1"
    loss = "loss"


def _option(*names: str, panel: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **more)


def finetune(
    train: Annotated[str, _option("--train", panel=_DATA, help="Training images.", metavar="DATA")],
    output: Output,
    base: Annotated[str, _option("--base", panel=_DATA, metavar="CKPT",
        help="Where training starts; 'none' trains from scratch.")] = "none",
    model: Model = None,
    val: Annotated[str | None, _option("--val", panel=_DATA, metavar="DATA",
        help="Held-out images, scored on the way.")] = None,
    templates: Templates = None,
    classnames: Classnames = None,
    limit: Limit = None,
    skip_bad: SkipBad = False,
    method: Annotated[Methods, _option("--method", panel=_METHOD, help="How to finetune.")] = Methods.flyp,
    towers: Annotated[Towers, _option("--towers", panel=_METHOD,
        help="Which towers train; text is LiT's locked image tower.")] = Towers.both,
    shots: Annotated[int | None, _option("--shots", panel=_METHOD, min=1,
        help="So many images a class; the best held-out loss is kept.")] = None,
    head: Annotated[str | None, _option("--head", panel=_METHOD, metavar="CKPT",
        help="Take classification_head from this checkpoint.")] = None,
    augment: Annotated[str, _option("--augment", panel=_METHOD,
        help="none, or of crop:0.9 flip jitter:0.4 gray:0.2 randaugment:N,M joined by +, or a JSON aug-cfg.")] = "crop",
    mixup: Annotated[float, _option("--mixup", panel=_METHOD, min=0, help="Beta(a, a) mixing of images.")] = 0.0,
    label_smoothing: Annotated[float, _option("--label-smoothing", panel=_METHOD, min=0, max=1,
        help="Share of the target spread over all.")] = 0.0,
    multi_positive: Annotated[bool, _option("--multi-positive", panel=_METHOD,
        help="Images of one class are positives of each other (not FLYP).")] = False,
    logit_scale: Annotated[Scale, _option("--logit-scale", panel=_METHOD,
        help="clamped: at most 100.")] = Scale.learned,
    car_weight: Annotated[float, _option("--car-weight", panel=_METHOD, help="Weight of CAR-FT's term.")] = 1.0,
    lr: Annotated[float, _option("--lr", panel=_OPTIMISER, help="Peak learning rate.")] = 1e-5,
    wd: Annotated[float, _option("--wd", panel=_OPTIMISER, help="Weight decay.")] = 0.1,
    decay: Annotated[Decay, _option("--decay", panel=_OPTIMISER,
        help="matrices: not norms, biases, logit_scale.")] = Decay.all,
    batch_size: Annotated[int, _option("--batch-size", panel=_OPTIMISER, min=1,
        help="Images of a step on one device.")] = 512,
    accumulate: Annotated[int, _option("--accumulate", panel=_OPTIMISER, min=1,
        help="Batches whose gradients make a step.")] = 1,
    chunk: Annotated[int | None, _option("--chunk", panel=_OPTIMISER, min=1,
        help="Gradient caching: so many images in memory, the exact loss over the batch.")] = None,
    epochs: Annotated[float | None, _option("--epochs", panel=_OPTIMISER,
        help="Passes over the images; 10 by default.")] = None,
    steps: Annotated[int | None, _option("--steps", panel=_OPTIMISER, min=1, help="Instead of --epochs.")] = None,
    warmup: Annotated[int | None, _option("--warmup", panel=_OPTIMISER, min=0,
        help="Steps; by default 500, a tenth of all at most.")] = None,
    clip_grad: Annotated[float | None, _option("--clip-grad", panel=_OPTIMISER, help="Largest norm.")] = None,
    ema: Annotated[float | None, _option("--ema", panel=_OPTIMISER, help="Decay of a moving average.")] = None,
    seed: Annotated[int, _option("--seed", panel=_OPTIMISER, help="Of everything random.")] = 0,
    device: Annotated[str | None, _option("--device", panel=_SPEED, help="By default the GPU if there is one.")] = None,
    precision: Annotated[Precisions, _option("--precision", panel=_SPEED,
        help="Of the towers, by autocast.")] = Precisions.fp32,
    compile: Annotated[bool, _option("--compile", panel=_SPEED, help="torch.compile.")] = False,
    checkpointing: Annotated[bool, _option("--checkpointing", panel=_SPEED,
        help="Less memory, a third more time.")] = False,
    fsdp: Annotated[bool, _option("--fsdp", panel=_SPEED, help="Shard the model over torchrun's processes.")] = False,
    workers: Annotated[int | None, _option("--workers", panel=_SPEED, min=0, help="Decode threads.")] = None,
    score_every: Annotated[int | None, _option("--score-every", panel=_KEEP,
        help="Steps between held-out scores; an epoch by default.")] = None,
    select: Annotated[Select | None, _option("--select", panel=_KEEP,
        help="The checkpoint to write: the last, or the best held-out one.")] = None,
    select_by: Annotated[SelectBy | None, _option("--select-by", panel=_KEEP, help="What is best.")] = None,
    trajectory: Annotated[int, _option("--trajectory", panel=_KEEP, min=0,
        help="Keep so many evenly spaced checkpoints.")] = 0,
    save_start: Annotated[bool, _option("--save-start", panel=_KEEP,
        help="Also keep base and initial head, for WiSE-FT over a trained head.")] = False,
    save_every: Annotated[int | None, _option("--save-every", panel=_KEEP, min=0,
        help="Steps between saved states; 0: none.")] = None,
    resume: Annotated[bool, _option("--resume", panel=_KEEP, help="Go on from the saved state.")] = False,
    tensorboard: Annotated[Path | None, _option("--tensorboard", panel=_KEEP, help="Folder for its log.")] = None,
    plot: Plot = None,
    force: Force = False,
    json: Json = False,
    quiet: Quiet = False,
) -> None:  # fmt: skip
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
    from clipmerge.data.open import open_split
    from clipmerge.device import resolve_device
    from clipmerge.finetuning.methods import finetune as run
    from clipmerge.weights.weights import load
    from clipmerge_cli import show
    from clipmerge_cli.live import live

    distributed.start(resolve_device(device))
    quiet = quiet or not distributed.is_first()

    def opened(text: str, role: str, limit: int | None = None) -> Any:
        split = open_split(text, role=role, classnames=classnames, limit=limit, skip_bad=skip_bad)
        show.left_out(split.source, split.skipped, len(split), quiet=quiet)
        return split

    with live(quiet=quiet or json) as (on_progress, on_event):
        weights = run(
            None if base == "none" else load(base),
            opened(train, "train", limit),
            val=None if val is None else opened(val, "val"),
            head=None if head is None else load(head),
            out=output, model=model, method=method.value, towers=towers.value, templates=templates, lr=lr, wd=wd,
            decay=decay.value, batch_size=batch_size, accumulate=accumulate, chunk=chunk, epochs=epochs, steps=steps,
            warmup=warmup, shots=shots, seed=seed, augment=_augment(augment), mixup=mixup,
            label_smoothing=label_smoothing, clip_grad=clip_grad, ema=ema, multi_positive=multi_positive,
            logit_scale=logit_scale.value, car_weight=car_weight, device=device, precision=precision.value,
            checkpointing=checkpointing, compile=compile, fsdp=fsdp, workers=workers, score_every=score_every,
            select=None if select is None else select.value, trajectory=trajectory,
            select_by=None if select_by is None else select_by.value, save_every=save_every, resume=resume,
            start=save_start, tensorboard=tensorboard, force=force, on_progress=on_progress, on_event=on_event,
        )  # fmt: skip
    if distributed.is_first():
        if plot is not None:
            from clipmerge.finetuning.log import read
            from clipmerge.report import figures

            figures.training(read(output.with_name(f"{output.stem}.log.jsonl")), plot)
        if json:
            show.document({"file": output, "training": weights.record.get("training", {})})
        else:
            show.wrote(output, quiet=quiet)
    distributed.finish()


def _augment(text: str) -> str | dict[str, Any]:
    """A JSON object (open_clip's aug-cfg), or the steps as they are."""
    import json

    if not text.lstrip().startswith("{"):
        return text
    try:
        return dict(json.loads(text))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not JSON: {error}", param_hint="--augment") from error
