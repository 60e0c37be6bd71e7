"""Finetune a model: what each method starts from, what it trains, and its loss; everything else is the one loop."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from blake3 import blake3
from torch import nn
from torch.nn import functional as F

from clipmerge import distributed
from clipmerge.checkpoint.output import make_folder
from clipmerge.data.join import join
from clipmerge.data.prompts import CONTEXTS, context_templates, recorded_prompts
from clipmerge.data.sampling import few_shot
from clipmerge.data.split import Split
from clipmerge.device import (
    deterministic,
    float32_matmul,
    out_of_memory_hint,
    resolve_device,
    resolve_precision,
)
from clipmerge.errors import DeviceError, TrainingError
from clipmerge.evaluate.heads import average_templates
from clipmerge.evaluate.setup import as_recorded
from clipmerge.finetuning.batches import (
    Prompts,
    Sampler,
    Tokenizer,
    fit_batch,
    set_shares,
    tokenizer_of,
    training_prompts,
)
from clipmerge.finetuning.checkpointing import Checkpoints, Files
from clipmerge.finetuning.head import attach_head, held_out_scores, initial_head, read_head
from clipmerge.finetuning.images import Images, check_images, resident
from clipmerge.finetuning.log import Event, Log
from clipmerge.finetuning.loop import train_steps
from clipmerge.finetuning.objective import BaseContexts, Classification, Contrastive, Objective
from clipmerge.finetuning.settings import Settings
from clipmerge.finetuning.state import TrainingState
from clipmerge.finetuning.towers import HEAD, Towers, freeze, has_batch_norm, set_modes, wrap
from clipmerge.model import ModelSpec, build_model, load_weights, resolve_model
from clipmerge.types import Progress
from clipmerge.weights.digest import content_digest
from clipmerge.weights.weights import Weights, as_weights, load

__all__ = ["apply_method", "base_contexts", "finetune", "starting_model", "with_defaults"]


def finetune(
    base: Weights | str | Path | None,
    train: Split | Mapping[str, Split],
    *,
    out: str | Path,
    model: str | Path | ModelSpec | None = None,
    val: Split | Mapping[str, Split] | None = None,
    head: Weights | str | Path | None = None,
    settings: Settings | None = None,
    resume: bool = False,
    tensorboard: str | Path | None = None,
    metadata: Mapping[str, Any] | None = None,
    force: bool = False,
    on_progress: Progress | None = None,
    on_event: Callable[[Event], None] | None = None,
    **hyperparameters: Any,
) -> Weights:
    """Finetune a model and write it to `out`, in open_clip's names, with the hyperparameters in its metadata.

    Beside `out` (ft.safetensors) stand the log (ft.log.jsonl), the state of an unfinished run (ft.state), and what
    was asked for, in ft.run/: ft.best, ft.step000100, ft.start (.safetensors). Under torchrun all ranks
    call it; rank 0 writes.

    Args:
        base: where training starts; None trains from scratch, which needs `model`. The prompts and class names that
            it records for the images' classes are used unless others are given.
        train: images with labels (or, for flyp, with captions); several sets by name are trained on together, with
            one softmax over all their prompts, drawn by `shares`.
        model: read from the base's metadata where left out.
        val: held-out images: scored every `score_every` steps (each epoch by default) and at the end; of several
            sets the mean decides.
        head: "trained", a method's own start; "frozen", the zero-shot head as it is; or weights whose
            `classification_head.*` is taken (model recycling: the shared head).
        settings: the hyperparameters as a value; None takes the defaults.
        resume: go on from the state of an unfinished run with the same settings.
        tensorboard: folder for TensorBoard's event files, besides the log.
        metadata: added to the checkpoint's own.
        hyperparameters: fields of `Settings` that are changed: `method="ce", lr=1e-5, epochs=5`.

    Raises:
        TrainingError: settings that do not fit together, a loss that is not finite, or a signal to stop.
        DataError: images without what the method needs.
    """
    if isinstance(head, str) and head in ("frozen", "trained"):
        hyperparameters["frozen_head"] = head == "frozen"
    settings = Settings.create(settings, hyperparameters)
    if head is not None and settings.row.head is None:
        raise TrainingError(f"{settings.method} trains no head", hint="--head goes with ce, car-ft and lp-ft")
    if isinstance(head, str) and head in ("frozen", "trained"):
        head = None
    sets = {"": train} if isinstance(train, Split) else dict(train)
    held_out = {} if val is None else {"": val} if isinstance(val, Split) else dict(val)
    base = None if base is None else as_weights(base)
    if base is not None and settings.templates is None:
        sets, held_out = ({n: as_recorded(s, base) for n, s in d.items()} for d in (sets, held_out))
    if settings.shots is not None:
        sets = {name: few_shot(split, settings.shots, settings.seed) for name, split in sets.items()}
    train = join(sets) if len(sets) > 1 else next(iter(sets.values()))
    if head is not None and settings.frozen_head:
        raise TrainingError(
            "a frozen head is the base's zero-shot head", hint="give frozen_head or head, not both"
        )
    check_images(settings, train, held_out)
    sizes = {name: len(split) for name, split in sets.items()}
    shares = set_shares(settings.shares, sizes)
    device = resolve_device(settings.device)
    precision = resolve_precision(settings.precision, device)
    distributed.start(device)
    files = Files(Path(out))
    files.check(force=force, resume=resume)
    if tensorboard is not None:
        make_folder(Path(tensorboard))
    if settings.fsdp and distributed.world() == 1:
        raise DeviceError("--fsdp needs several processes", hint="start it with torchrun -m clipmerge")
    own_seed = torch.random.fork_rng([device.index] if device.type == "cuda" else [])
    less = out_of_memory_hint("use a smaller --batch-size, --chunk N or --checkpointing")
    exact = deterministic(device, wanted=settings.deterministic)
    with float32_matmul(precision), exact, own_seed, less, distributed.explain_lost_peer():
        torch.manual_seed(settings.seed + distributed.rank())  # dropout follows it
        # The model, its images and prompts.
        head = None if head is None else as_weights(head)
        net, spec = starting_model(base, model, settings.seed, device)
        settings = with_defaults(settings, net, from_scratch=base is None)
        probed = next(iter(held_out.values())) if len(held_out) == 1 else None
        images = Images(train, probed, spec.preprocess, device, settings, on_progress)
        loader = images.loader()
        tokenizer = tokenizer_of(spec)
        prompts = training_prompts(net, tokenizer, train, settings.templates, device)

        # What trains, in what order, for how long.
        recorded = {**settings.recorded(), "precision": precision}
        identity = {**recorded, "processes": distributed.world(), "start": _fingerprint(net, train)}
        towers = Towers(net, spec.preprocess, precision, settings.channels_last)
        objective = apply_method(towers, tokenizer, prompts, images, settings, head)
        batch = fit_batch(settings.batch_size, distributed.world(), settings.accumulate, len(train))
        sampler = Sampler(
            train.labels, prompts.first, prompts.count, settings.seed, batch, settings.accumulate, shares
        )
        epochs = 10 if settings.epochs is None else settings.epochs
        steps = settings.steps or max(1, round(sampler.steps_per_epoch * epochs))

        # What changes, and what is kept of it.
        state = TrainingState.begin(towers, settings)
        log = Log(files.log if distributed.is_first() else None, tensorboard=tensorboard, on_event=on_event)
        checkpoints = Checkpoints(
            files,
            state,
            log,
            settings,
            steps=steps if settings.row.steps else 0,
            steps_per_epoch=sampler.steps_per_epoch,
            identity=identity,
            training={
                **recorded,
                "base": _parents(base),
                "images": len(train),
                **({"sets": sizes} if len(sets) > 1 else {}),
            },
            metadata=metadata or {},
            prompts=recorded_prompts(train, settings.templates),
            spec=spec,
            score=_scorer(towers, tokenizer, images, held_out, settings),
        )
        done = checkpoints.resume() if resume else 0
        log.begin(done)
        if settings.start and not done:
            checkpoints.write(files.beside("start"), 0)
        train_steps(objective, state, sampler, loader, checkpoints, settings, done, on_progress)
        written = checkpoints.finish()
        log.close()
        distributed.barrier()
    return load(written)


def with_defaults(settings: Settings, net: nn.Module, *, from_scratch: bool) -> Settings:
    """Return the settings with what depends on the model.

    BatchNorm's statistics stay as they are unless training starts from scratch. Measured with EfficientNet-Lite0 on
    CIFAR-10, 100 steps of 64 under a frozen head, held-out accuracy with frozen and with batch statistics: 59 and 42 %
    of 200 training images, 73 and 53 of 2,000, 74 and 57 of 10,000; on GTSRB's 3,500, 300 steps, 85 and 72.

    Raises:
        TrainingError: BatchNorm is to be frozen in a model that has none, or must be for gradient caching.
    """
    clip, freeze = settings.clip_grad, settings.freeze_batch_norm
    if clip is None and settings.frozen_head:
        clip = 1.0  # as in the code of task arithmetic and PAINT
    if has_batch_norm(net):
        freeze = not from_scratch if freeze is None and settings.row.steps else freeze
        if settings.chunk is not None and not freeze:
            raise TrainingError(
                "--chunk encodes every image twice, in pieces, of which BatchNorm would take statistics",
                hint="use --freeze-batch-norm, or a smaller --batch-size without --chunk",
            )
    elif freeze is not None:
        raise TrainingError(
            "--freeze-batch-norm does nothing here: the model has no BatchNorm", hint="leave it out"
        )
    return replace(settings, clip_grad=clip, freeze_batch_norm=freeze)


def starting_model(
    base: Weights | None, model: str | Path | ModelSpec | None, seed: int, device: torch.device
) -> tuple[nn.Module, ModelSpec]:
    """Return the base's towers in memory, or open_clip's random initialisation where there is no base.

    Raises:
        TrainingError: there is neither a base nor a model.
    """
    if base is None and model is None:
        raise TrainingError("training from scratch needs to know the model", hint="name it with --model")
    spec = resolve_model(model, *([] if base is None else [base]))
    if base is None:
        return build_model(spec, device, seed=seed), spec
    net = build_model(spec, device)
    load_weights(net, base)
    if hasattr(net, HEAD):
        delattr(net, HEAD)  # a run starts a head of its own, or none
    return net, spec


def _fingerprint(net: nn.Module, train: Split) -> str:
    """Return what a resumed run must share besides its settings: the weights it started from, items and labels."""
    hasher = blake3(repr((train.classes, train.names, train.labels.tolist())).encode())
    for name, value in sorted(net.state_dict().items()):
        hasher.update(name.encode())
        hasher.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def _parents(base: Weights | None) -> list[dict[str, str | None]]:
    """Return what the base was read from, by file name and content, for the record of what is trained from it."""
    checkpoints = base.checkpoints if base is not None else ()
    return [{"file": c.path.name if c.path else None, "digest": content_digest(c)} for c in checkpoints]


def _scorer(
    towers: Towers, tokenizer: Tokenizer, images: Images, held_out: Mapping[str, Split], settings: Settings
) -> Callable[[], dict[str, float]] | None:
    """Return what scores the model as it is: the means over sets, and each set's; None without held-out images."""
    scorers = {}
    for name, split in held_out.items():
        prompts = training_prompts(towers.model, tokenizer, split, settings.templates, images.device)
        pixels = resident(replace(images, val=split).held_out(), images.device)
        size = min(settings.batch_size, 256)
        scorers[name] = partial(held_out_scores, towers, split, pixels, prompts, size)

    def score() -> dict[str, float]:
        each = {name: scorer() for name, scorer in scorers.items()}
        means = {key: sum(scores[key] for scores in each.values()) / len(each) for key in ("top1", "loss")}
        several = {f"{name} {key}": value for name, scores in each.items() for key, value in scores.items()}
        return {**means, **(several if len(each) > 1 else {})}

    return score if scorers else None


def apply_method(
    towers: Towers,
    tokenizer: Tokenizer,
    prompts: Prompts,
    images: Images,
    settings: Settings,
    head: Weights | None = None,
) -> Objective:
    """Return the objective over the towers, wrapped for this world; what does not train is frozen and computed once.

    Args:
        head: the checkpoint whose head is taken instead of the method's own start.
    """
    objective: Contrastive | Classification
    head_from = settings.row.head
    if head_from is None:
        objective = Contrastive(towers, prompts, settings)
        image, text, scale = objective.trains_image, objective.trains_text, settings.logit_scale != "frozen"
        if not text:
            objective.text_table = towers.prompt_features(prompts.tokens)
        if not image and not images.random:
            objective.image_table = images.features(towers, images.plain())
    else:
        image, text, scale = True, False, False
        contexts = base_contexts(towers, tokenizer, images, settings) if settings.row.contexts else None
        objective = Classification(towers, settings, contexts)
        if settings.frozen_head:
            objective.frozen = average_templates(towers.prompt_features(prompts.tokens), prompts.classes)
        elif head is None:
            attach_head(towers.model, *initial_head(head_from, towers, prompts, images))
        else:
            attach_head(towers.model, *read_head(head, prompts.classes))
    freeze(towers.model, image=image, text=text, scale=scale)
    set_modes(towers.model, image=image, text=text, batch_norm=not settings.freeze_batch_norm)
    if settings.checkpointing:
        towers.model.set_grad_checkpointing(True)  # type: ignore[operator]
    synced = distributed.world() > 1 and not settings.fsdp and settings.chunk is None
    objective.module = wrap(towers, sharded=settings.fsdp, synced=synced, compiled=settings.compile)
    return objective


def base_contexts(towers: Towers, tokenizer: Tokenizer, images: Images, settings: Settings) -> BaseContexts:
    """Return CAR-FT's frozen side: the base's image tower, and a vector for each context.

    A context's vector is the mean over classes of its unit prompt features, made a unit vector again.
    Source: Mao et al. 2022, arXiv 2211.16175.
    """
    templates = context_templates(settings.contexts or CONTEXTS)
    prompts = training_prompts(towers.model, tokenizer, images.train, templates, images.device)
    features = towers.prompt_features(prompts.tokens)
    vectors = F.normalize(features.view(prompts.classes, -1, features.shape[1]).mean(dim=0), dim=-1)
    frozen = deepcopy(towers).eval().requires_grad_(False)
    fixed = not images.random and not settings.mixup
    table = images.features(frozen, images.plain()) if fixed else None
    return BaseContexts(vectors, float(towers.exp_scale.detach()), frozen, table)
