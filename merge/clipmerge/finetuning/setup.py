"""What a run starts from: the model, its prompts, its pixels, its head, and what frozen towers give once."""

import json
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn

from clipmerge.errors import TrainingError
from clipmerge.finetuning.batches import Prompts, caption_prompts, class_prompts
from clipmerge.finetuning.features import context_vectors, image_features, prompt_features, zero_shot
from clipmerge.finetuning.heldout import held_out_score
from clipmerge.finetuning.objective import Classification, Contrastive
from clipmerge.finetuning.probe import linear_probe
from clipmerge.finetuning.towers import HEAD, Towers
from clipmerge.types import Progress

if TYPE_CHECKING:
    from pathlib import Path

    from clipmerge.data.split import Split
    from clipmerge.finetuning.images import Images, Pixels
    from clipmerge.model import ModelSpec
    from clipmerge.weights.weights import Weights

__all__ = ["give_head", "starting_model", "training_prompts"]


def starting_model(
    base: "Weights | None", model: "str | Path | ModelSpec | None", seed: int, device: torch.device
) -> tuple[nn.Module, "ModelSpec"]:
    """The base's towers in memory, or open_clip's random initialisation where there is no base.

    Raises:
        TrainingError: there is neither a base nor a model.
    """
    from clipmerge.model import build_model, load_weights, resolve_model

    if base is None and model is None:
        raise TrainingError("training from scratch needs to know the model", hint="name it with --model")
    spec = resolve_model(model, *([] if base is None else [base]))
    if base is None:
        return build_model(spec, device, seed=seed), spec
    built = build_model(spec, device)
    load_weights(built, base)
    if hasattr(built, HEAD):
        delattr(built, HEAD)
    return built, spec


def training_prompts(
    model: nn.Module,
    spec: "ModelSpec",
    split: "Split",
    templates: Sequence[str] | str | None,
    device: torch.device,
) -> Prompts:
    """What the text tower is trained on: class names in templates, or captions where there are no classes."""
    from dataclasses import replace

    from clipmerge.data.prompts import prompts
    from clipmerge.data.prompts import templates as find_templates

    tokenizer = _tokenizer(json.dumps(spec.to_metadata()))
    if split.classes:
        found = class_prompts(
            split, prompts(split.classes, find_templates(templates, split)), tokenizer, model
        )
    elif split.captions is not None:
        found = caption_prompts(split, tokenizer, model)
    else:
        raise TrainingError(f"{split.source} has neither classes nor captions", hint="name its classes")
    return replace(found, tokens=found.tokens.to(device))


@lru_cache(maxsize=4)
def _tokenizer(model: str) -> Callable[[list[str]], Tensor]:
    """The tokenizer of a model's record; reading its vocabulary takes longer than a tiny model's step."""
    from clipmerge.model import ModelSpec, get_tokenizer

    return get_tokenizer(ModelSpec.from_metadata(json.loads(model)))


def give_head(model: nn.Module, weight: Tensor, bias: Tensor | None = None) -> None:
    """Put `classification_head` on the model: over unit features, exp(logit_scale) is part of the weight."""
    head = nn.Linear(weight.shape[1], weight.shape[0], device=weight.device)
    with torch.no_grad():
        head.weight.copy_(weight)
        head.bias.zero_() if bias is None else head.bias.copy_(bias)
    model.add_module(HEAD, head)


def head_of(weights: "Weights", classes: int) -> tuple[Tensor, Tensor | None]:
    """`classification_head.*` of a checkpoint.

    Raises:
        TrainingError: it has none, or one for another number of classes.
    """
    found = weights.state_dict()
    if f"{HEAD}.weight" not in found:
        raise TrainingError(f"{weights!r} has no {HEAD}", hint="make one with --method linear-probe")
    weight = found[f"{HEAD}.weight"].float()
    if len(weight) != classes:
        raise TrainingError(
            f"{weights!r} has a head for {len(weight)} classes, the data have {classes}",
            hint="share a head only between data with the same classes",
        )
    bias = found.get(f"{HEAD}.bias")
    return weight, None if bias is None else bias.float()


def start_head(
    kind: Literal["zero-shot", "probe"],
    towers: Towers,
    prompts: Prompts,
    images: "Images",
    batch_size: int,
    on_progress: Progress | None,
) -> tuple[Tensor, Tensor | None]:
    """The head that training starts from: exp(logit_scale) times the zero-shot head, or a linear probe."""
    if kind == "zero-shot":
        scale = cast("Tensor", towers.model.logit_scale).detach().exp()
        return scale * zero_shot(prompt_features(towers, prompts), prompts.classes), None

    def features(pixels: "Pixels") -> Tensor:
        return image_features(
            towers, pixels, images.device, batch_size, what="features for the probe", on_progress=on_progress
        )

    val = images.val
    chosen_by = None if val is None else (features(images.held_out()), val.labels)
    weight, bias = linear_probe(
        features(images.plain()), images.train.labels, prompts.classes, held_out=chosen_by
    )
    return weight.to(images.device), bias.to(images.device)


def context_start(
    towers: Towers, spec: "ModelSpec", split: "Split", contexts: Sequence[str] | None, device: torch.device
) -> tuple[Tensor, float, Towers]:
    """CAR-FT's frozen side: context vectors, the base's exp(logit_scale), and the base's image tower."""
    from clipmerge.data.prompts import CONTEXTS, context_templates

    texts = context_templates(contexts or CONTEXTS)
    found = training_prompts(towers.model, spec, split, list(texts), device)
    vectors = context_vectors(prompt_features(towers, found), found.classes)
    frozen = deepcopy(towers).eval().requires_grad_(False)
    scale = float(cast("Tensor", towers.model.logit_scale).detach().exp())
    return vectors, scale, frozen


def fingerprint(model: nn.Module, split: "Split") -> str:
    """What a resumed run must share besides its settings: the weights it started from, items and labels."""
    from blake3 import blake3

    hasher = blake3(repr((split.classes, split.names, split.labels.tolist())).encode())
    for name, value in sorted(model.state_dict().items()):
        hasher.update(name.encode())
        hasher.update(value.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def parents(base: "Weights | None") -> list[dict[str, str | None]]:
    """What a base was read from, by file name and content, for the record of what is trained from it."""
    from clipmerge.weights.digest import content_digest

    checkpoints = base.checkpoints if base is not None else ()
    return [{"file": c.path.name if c.path else None, "digest": content_digest(c)} for c in checkpoints]


def likes_channels_last(model: nn.Module, device: torch.device) -> bool:
    """Whether the image tower is convolutional beyond its patches, on a GPU."""
    convolutions = sum(isinstance(m, nn.Conv2d) for m in model.modules())
    return device.type == "cuda" and convolutions > 1


def training_mode(model: nn.Module, *, image: bool, checkpointing: bool) -> None:
    """Dropout and batch statistics as in training, except in an image tower that is frozen."""
    model.train()
    cast("nn.Module", model.visual).train(image)
    if checkpointing:
        model.set_grad_checkpointing(True)  # type: ignore[operator]


def step_count(per_epoch: int, epochs: float | None, steps: int | None) -> int:
    """Steps in all: as told, or so many epochs, or 10 epochs."""
    return steps if steps is not None else max(1, round(per_epoch * (10 if epochs is None else epochs)))


def contrastive(
    towers: Towers,
    module: nn.Module,
    prompts: Prompts,
    images: "Images",
    trains: Literal["both", "image", "text"],
    batch_size: int,
    **options: Any,
) -> Contrastive:
    """The contrastive objective, with the features of a frozen tower looked up where nothing in them is random."""
    texts = prompt_features(towers, prompts) if trains == "image" else None
    fixed = trains == "text" and images.augment is None
    found = image_features(towers, images.plain(), images.device, batch_size) if fixed else None
    return Contrastive(
        towers, module, prompts, trains_image=trains != "text", trains_text=trains != "image",
        image_table=found, text_table=texts, **options,
    )  # fmt: skip


def classification(
    towers: Towers,
    module: nn.Module,
    images: "Images",
    context: tuple[Tensor, float, Towers] | None,
    batch_size: int,
    *,
    seed: int,
    label_smoothing: float,
    mixup: float,
    weight: float,
) -> Classification:
    """Cross-entropy over the head, with CAR-FT's term where there are context vectors."""
    if context is None:
        return Classification(towers, module, seed, label_smoothing, mixup)
    vectors, scale, frozen = context
    fixed = images.augment is None and not mixup
    table = image_features(frozen, images.plain(), images.device, batch_size) if fixed else None
    return Classification(towers, module, seed, label_smoothing, mixup, vectors, scale, weight, frozen, table)


def scorer(
    towers: Towers,
    spec: "ModelSpec",
    images: "Images",
    templates: Sequence[str] | str | None,
    batch_size: int,
) -> Callable[[], Mapping[str, float]] | None:
    """Held-out scores of the model as it is; None without held-out images."""
    val = images.val
    if val is None:
        return None
    prompts = training_prompts(towers.model, spec, val, templates, images.device)
    pixels = images.held_out()
    return lambda: held_out_score(towers, val, pixels, prompts, images.device, batch_size)
