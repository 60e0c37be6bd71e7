"""The trained head, `classification_head`: over unit features; exp(logit_scale) is part of its weight."""

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from clipmerge.distributed import broadcast
from clipmerge.errors import TrainingError
from clipmerge.evaluate.heads import average_templates
from clipmerge.finetuning.images import Images
from clipmerge.finetuning.probe import linear_probe
from clipmerge.finetuning.prompts import Prompts
from clipmerge.finetuning.towers import HEAD, Towers
from clipmerge.weights.weights import Weights

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["attach_head", "initial_head", "read_head"]


@torch.no_grad()
def attach_head(
    model: nn.Module, weight: "Float[Tensor, 'classes d']", bias: "Float[Tensor, ' classes'] | None" = None
) -> None:
    """Put a head on the model, on the model's device; every rank gets the first one's, to the bit."""
    head = nn.Linear(weight.shape[1], weight.shape[0], device=next(model.parameters()).device)
    head.weight.copy_(weight)
    head.bias.zero_() if bias is None else head.bias.copy_(bias)
    broadcast(head.weight.data)
    broadcast(head.bias.data)
    model.add_module(HEAD, head)


def initial_head(
    kind: Literal["zero-shot", "probe"], towers: Towers, prompts: Prompts, images: Images
) -> tuple[Tensor, Tensor | None]:
    """Return what a head starts from: exp(logit_scale) times the zero-shot head, or a linear probe."""
    if kind == "zero-shot":
        unit = average_templates(towers.prompt_features(prompts.tokens), prompts.classes)
        return towers.exp_scale.detach() * unit, None
    what = "features for the probe"
    held_out = None
    if images.val is not None:
        held_out = images.features(towers, images.held_out(), what), images.val.labels
    features = images.features(towers, images.plain(), what)
    return linear_probe(features, images.train.labels, prompts.classes, held_out=held_out)


def read_head(weights: Weights, classes: int) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of a checkpoint's head.

    Raises:
        TrainingError: it has none, or one for another number of classes.
    """
    tensors = weights.state_dict()
    if f"{HEAD}.weight" not in tensors:
        raise TrainingError(f"{weights!r} has no {HEAD}", hint="make one with --method linear-probe")
    weight, bias = tensors[f"{HEAD}.weight"], tensors.get(f"{HEAD}.bias")
    if len(weight) != classes:
        raise TrainingError(
            f"{weights!r} has a head for {len(weight)} classes, the data have {classes}",
            hint="share a head only between data with the same classes",
        )
    return weight, bias
