"""`finetune`: what each method starts from, what it trains, and its loss; everything else is the one loop."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from clipmerge.errors import TrainingError
from clipmerge.finetuning.misfits import refuse_misfits
from clipmerge.text import nearest
from clipmerge.types import Progress

if TYPE_CHECKING:
    from clipmerge.data.split import Split
    from clipmerge.finetuning.objective import Objective
    from clipmerge.model import ModelSpec
    from clipmerge.weights.weights import Weights

    Event = Callable[[Mapping[str, Any]], None]

__all__ = ["METHODS", "Method", "finetune"]


@dataclass(frozen=True)
class Method:
    """A row of the table of methods.

    Attributes:
        head: what the trained head starts from ("zero-shot", "probe"); None trains no head but both towers.
        steps: whether anything is trained after that start.
        contexts: whether CAR-FT's term keeps the base's context distribution.
    """

    summary: str
    head: Literal["zero-shot", "probe"] | None
    steps: bool = True
    contexts: bool = False


METHODS: Mapping[str, Method] = {
    "flyp": Method("finetune like you pretrain: the contrastive loss against class prompts", None),
    "ce": Method("cross-entropy, the head starts from the zero-shot head", "zero-shot"),
    "car-ft": Method(
        "cross-entropy, and the base's context distribution is kept", "zero-shot", contexts=True
    ),
    "lp-ft": Method("a linear probe first, then full finetuning from its head", "probe"),
    "linear-probe": Method("a linear probe on frozen features, nothing else", "probe", steps=False),
}
"""Sources: FLYP 2212.00638, WiSE-FT's CE 2109.01903, CAR-FT 2211.16175, LP-FT 2202.10054."""


RECORDED = frozenset(
    {
        "method", "towers", "templates", "contexts", "lr", "wd", "decay", "batch_size",
        "accumulate", "chunk", "epochs", "steps", "warmup", "shots", "seed", "augment", "mixup",
        "label_smoothing", "clip_grad", "ema", "multi_positive", "logit_scale", "car_weight",
        "precision", "score_every", "select", "select_by", "trajectory"
    }
)  # fmt: skip
"""The hyperparameters: written into the checkpoint's metadata, and what a resumed run must agree on."""


def _unknown(method: str) -> NoReturn:
    close = nearest(method, METHODS)
    raise TrainingError(
        f"{method!r} is no method", hint=f"did you mean {close}?" if close else ", ".join(METHODS)
    )


def finetune(
    base: "Weights | None",
    train: "Split",
    *,
    out: str | Path,
    model: "str | Path | ModelSpec | None" = None,
    method: str = "flyp",
    val: "Split | None" = None,
    towers: Literal["both", "image", "text"] = "both",
    templates: Sequence[str] | str | None = None,
    contexts: Sequence[str] | None = None,
    head: "Weights | None" = None,
    lr: float = 1e-5,
    wd: float = 0.1,
    decay: Literal["all", "matrices"] = "all",
    batch_size: int = 512,
    accumulate: int = 1,
    chunk: int | None = None,
    epochs: float | None = None,
    steps: int | None = None,
    warmup: int | None = None,
    shots: int | None = None,
    seed: int = 0,
    augment: str | Mapping[str, Any] = "crop",
    mixup: float = 0.0,
    label_smoothing: float = 0.0,
    clip_grad: float | None = None,
    ema: float | None = None,
    multi_positive: bool = False,
    logit_scale: Literal["learned", "clamped", "frozen"] = "learned",
    car_weight: float = 1.0,
    device: str | None = None,
    precision: Literal["fp32", "bf16", "fp16"] = "fp32",
    checkpointing: bool = False,
    compile: bool = False,
    channels_last: bool | None = None,
    fsdp: bool = False,
    workers: int | None = None,
    score_every: int | None = None,
    select: Literal["last", "best"] | None = None,
    select_by: Literal["top1", "loss"] | None = None,
    trajectory: int = 0,
    save_every: int | None = None,
    resume: bool = False,
    start: bool = False,
    tensorboard: str | Path | None = None,
    metadata: Mapping[str, Any] | None = None,
    force: bool = False,
    on_progress: "Progress | None" = None,
    on_event: "Event | None" = None,
) -> "Weights":
    """The finetuned weights, written to `out` in open_clip's names with the hyperparameters in their metadata.

    Beside `out` (ft.safetensors) stand the log (ft.log.jsonl), the state of an unfinished run (ft.state), and what
    was asked for, in ft.run/: ft.best, ft.step000100, ft.start (.safetensors). Under torchrun all ranks
    call it; rank 0 writes.

    Args:
        base: where training starts; None trains from scratch, which needs `model`.
        train: images with labels (or, for flyp, with captions).
        model: read from the base's metadata where left out.
        method: a key of METHODS.
        val: held-out images: scored every `score_every` steps (each epoch by default) and at the end.
        towers: which towers train; "text" is LiT's locked image tower. Methods with a head train the image tower.
        templates: prompts with {}; None takes the data's own. One is drawn for each image at each visit.
        contexts: CAR-FT's contexts ("photo", "sketch" …); None takes the usual ones.
        head: take `classification_head.*` from these weights (model recycling: the shared head).
        decay: "matrices" leaves norms, biases and logit_scale out of weight decay.
        batch_size: images of one step on one process, before `accumulate`.
        chunk: gradient caching: the exact contrastive loss over the whole batch, `chunk` images in memory at once.
        epochs, steps: one of them; 10 epochs by default. warmup: in steps; by default 500, a tenth at most.
        shots: so many images of each class, drawn by `seed`; the best held-out loss then decides what is kept.
        augment: "none", "crop", "crop:0.5+flip+randaugment:2,9" …, or open_clip's aug-cfg.
        ema: decay of a moving average of the weights, which is then what is scored and written.
        multi_positive: images of one class are positives of each other (not FLYP).
        logit_scale: "clamped" keeps its exponential at 100 or below, "frozen" at the base's.
        car_weight: α of CAR-FT's term.
        select: which checkpoint `out` is ("last", with shots "best"); ft.best or ft.last holds the other.
        trajectory: so many evenly spaced checkpoints, the last among them.
        save_every: steps between saved states (each epoch by default); 0 saves none.
        resume: go on from the state of an unfinished run with the same settings.
        start: also write where finetuning started (base and initial head), for WiSE-FT over a trained head.

    Raises:
        TrainingError: settings that do not fit together, a loss that is not finite, or a signal to stop.
    """
    given = {name: value for name, value in locals().items() if name in RECORDED}
    row = METHODS.get(method) or _unknown(method)
    refuse_misfits(
        method, row, train, val, towers=towers, mixup=mixup, chunk=chunk, multi_positive=multi_positive, epochs=epochs,
        steps=steps, batch_size=batch_size, accumulate=accumulate, ema=ema, select=select,
    )  # fmt: skip

    import torch

    from clipmerge import distributed
    from clipmerge.data.sampling import few_shot
    from clipmerge.device import resolve_device
    from clipmerge.finetuning import setup
    from clipmerge.finetuning.augment import augmenter
    from clipmerge.finetuning.batches import Sampler, fitted_batch
    from clipmerge.finetuning.images import Images
    from clipmerge.finetuning.keeper import Keeper
    from clipmerge.finetuning.log import Log
    from clipmerge.finetuning.loop import train as loop
    from clipmerge.finetuning.optimiser import MovingAverage, adamw
    from clipmerge.finetuning.outputs import Outputs
    from clipmerge.finetuning.towers import Towers, freeze, trained_parameters, wrapped
    from clipmerge.weights.weights import load

    # where, from what, with what
    place = resolve_device(device)
    distributed.start(place)
    rank, ranks = distributed.rank(), distributed.world()
    train = train if shots is None else few_shot(train, shots, seed)
    net, spec = setup.starting_model(base, model, seed, place)
    record = {**given, "base": setup.parents(base), "images": len(train)}
    outputs = Outputs(Path(out), spec, record, metadata or {}, writer=distributed.is_first())
    outputs.check(force=force, resume=resume)
    images = Images(train, val, spec.preprocess, place, augmenter(augment, spec.preprocess), on_progress)
    prompts = setup.training_prompts(net, spec, train, templates, place)
    body = Towers(net, spec.preprocess, precision=precision, channels_last=setup.likes_channels_last(net, place)
                  if channels_last is None else channels_last)  # fmt: skip

    # the head, and what stays frozen beside what trains
    probed = min(batch_size, 256)
    settings = {**given, "processes": ranks, "start": setup.fingerprint(net, train)}
    context = setup.context_start(body, spec, train, contexts, place) if row.contexts else None
    if head is not None:
        setup.give_head(net, *setup.head_of(head, prompts.classes))
    elif row.head is not None:
        setup.give_head(net, *setup.start_head(row.head, body, prompts, images, probed, on_progress))
    if start:
        outputs.write(outputs.beside("start"), net.state_dict(), step=0)
    freeze(net, image=row.head is not None or towers != "text", text=row.head is None and towers != "image",
           scale=row.head is None and logit_scale != "frozen")  # fmt: skip
    setup.training_mode(net, image=row.head is not None or towers != "text", checkpointing=checkpointing)

    # how long, in what order
    batch = fitted_batch(batch_size, ranks, accumulate, len(train))
    sampler = Sampler(train.labels, prompts.first, prompts.count, seed, batch, accumulate)
    total = setup.step_count(sampler.steps_per_epoch, epochs, steps) if row.steps else 0
    loader = images.loader(seed, workers=workers, rank=rank, ranks=ranks)

    # loss, optimiser, and what is kept
    synced = ranks > 1 and not fsdp and chunk is None
    module = wrapped(body, sharded=fsdp, synced=synced, compiled=compile)
    objective: Objective
    if row.head is None:
        objective = setup.contrastive(
            body, module, prompts, images, towers, probed, label_smoothing=label_smoothing,
            multi_positive=multi_positive, chunk=chunk, multiple=64 if compile else 1,
        )  # fmt: skip
    else:
        objective = setup.classification(
            body, module, images, context, probed, seed=seed, label_smoothing=label_smoothing, mixup=mixup,
            weight=car_weight,
        )  # fmt: skip
    trained = trained_parameters(net)
    optimiser = adamw(trained, lr=lr, wd=wd, decay=decay)
    average = MovingAverage(trained.values(), ema) if ema is not None else None
    scaler = torch.amp.GradScaler(place.type) if precision == "fp16" else None
    log = Log(outputs.log if outputs.writer else None, tensorboard=tensorboard, on_event=on_event)
    keeper = Keeper(
        outputs, net, optimiser, log, total, settings, average, scaler,
        score=setup.scorer(body, spec, images, templates, probed),
        score_every=sampler.steps_per_epoch if score_every is None else score_every,
        by=select_by or ("loss" if shots is not None else "top1"),
        save_every=max(sampler.steps_per_epoch, 100) if save_every is None else save_every,
        trajectory=frozenset(round(total * i / trajectory) for i in range(1, trajectory + 1)),
        sharded=fsdp,
    )  # fmt: skip

    done = keeper.resume() if resume else 0
    log.begin(done)
    if total:
        loop(
            objective, module, trained, optimiser, sampler, loader, log, start=done, steps=total, lr=lr,
            warmup=min(500, total // 10) if warmup is None else warmup, clip_grad=clip_grad,
            clamp=logit_scale == "clamped", average=average, scaler=scaler, synced=synced, sharded=fsdp,
            log_every=10 if place.type == "cuda" else 1, due=keeper.due, after=keeper.after, save=keeper.save,
            save_at=keeper.save_due, on_progress=on_progress,
        )  # fmt: skip
    else:
        keeper.after(0)
    written = keeper.finish(select or ("best" if shots is not None else "last"))
    log.close()
    distributed.barrier()
    return load(written)
