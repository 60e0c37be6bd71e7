"""Held-out scores of the model that trains, as it stands, without leaving the device."""

from typing import TYPE_CHECKING, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipmerge.finetuning.batches import Prompts
from clipmerge.finetuning.features import image_features, prompt_features, zero_shot
from clipmerge.finetuning.towers import HEAD, Towers

if TYPE_CHECKING:
    import numpy.typing as npt

    from clipmerge.data.split import Split

__all__ = ["held_out_score"]


@torch.no_grad()
def held_out_score(
    towers: Towers,
    split: "Split",
    pixels: "npt.NDArray[np.uint8] | Tensor",
    prompts: Prompts,
    device: torch.device,
    batch_size: int,
) -> dict[str, float]:
    """Accuracy ("top1") and mean cross-entropy ("loss"): the trained head's, or the zero-shot head's as it is now."""
    training = towers.training
    towers.eval()
    images = image_features(towers, pixels, device, batch_size)
    logits = split.covered(class_logits(towers, images, prompts))
    towers.train(training)
    labels = torch.from_numpy(split.labels).to(device)
    right = (logits.argmax(dim=1) == labels).float().mean()
    return {"top1": right.item(), "loss": F.cross_entropy(logits, labels).item()}


def class_logits(towers: Towers, images: Tensor, prompts: Prompts) -> Tensor:
    """Logits of unit image features: the trained head where there is one, else the zero-shot head of the prompts."""
    head = getattr(towers.model, HEAD, None)
    if head is not None:
        return cast("Tensor", cast("nn.Linear", head)(images))
    scale = cast("Tensor", towers.model.logit_scale).exp()
    return scale * images @ zero_shot(prompt_features(towers, prompts), prompts.classes).T
