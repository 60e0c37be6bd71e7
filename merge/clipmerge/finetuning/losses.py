"""The losses of finetuning: pure functions of features and logits. Features are unit vectors in fp32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from jaxtyping import Float, Int
    from torch import Tensor

__all__ = ["context_divergence", "contrastive", "cross_entropy"]


def contrastive(
    image: Float[Tensor, "batch dim"],
    text: Float[Tensor, "batch dim"],
    scale: Float[Tensor, ""],
    *,
    groups: Int[Tensor, " batch"] | None = None,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Compute the symmetric loss of CLIP and FLYP between images and the prompt drawn for each.

    Args:
        image, text: row i of one belongs to row i of the other.
        scale: exp(logit_scale).
        groups: where given, rows of equal group are all positives of each other (a variant, not FLYP); without
            it the targets are the diagonal, and two images of one class are negatives of each other.
        label_smoothing: share of the target spread evenly over the batch.

    Source: Radford et al. 2021, arXiv 2103.00020; Goyal et al. 2023, arXiv 2212.00638.
    """
    logits = scale * image @ text.T
    if groups is None:
        targets = torch.arange(len(logits), device=logits.device)
    else:
        same = (groups[:, None] == groups[None, :]).to(logits.dtype)
        targets = same / same.sum(dim=1, keepdim=True)
    by_image = F.cross_entropy(logits, targets, label_smoothing=label_smoothing)
    by_text = F.cross_entropy(logits.T, targets, label_smoothing=label_smoothing)
    return (by_image + by_text) / 2


def cross_entropy(
    logits: Float[Tensor, "batch classes"],
    labels: Int[Tensor, " batch"],
    *,
    mixed: tuple[Int[Tensor, " batch"], float] | None = None,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Compute the cross-entropy over the classes of a head, mean over the batch.

    Args:
        mixed: after mixup, the labels of each image's partner, and the weight of the image's own label.

    Source of mixup: Zhang et al. 2018, arXiv 1710.09412.
    """
    loss = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    if mixed is None:
        return loss
    partners, weight = mixed
    return weight * loss + (1 - weight) * F.cross_entropy(logits, partners, label_smoothing=label_smoothing)


def context_divergence(
    image: Float[Tensor, "batch dim"],
    base_image: Float[Tensor, "batch dim"],
    contexts: Float[Tensor, "contexts dim"],
    scale: Float[Tensor, ""] | float,
) -> Float[Tensor, ""]:
    """Compute KL(p_base(context | x) ‖ p(context | x)), mean over the batch: CAR-FT's addition to the cross-entropy.

    Args:
        image: features of the model that trains; base_image: features of the frozen base.
        contexts: one unit vector per context, the mean over classes of the base's prompt features, frozen.
        scale: exp(logit_scale) of the base.

    Source: Mao et al. 2022, arXiv 2211.16175.
    """
    log_base = F.log_softmax(scale * base_image @ contexts.T, dim=-1)
    log_tuned = F.log_softmax(scale * image @ contexts.T, dim=-1)
    return F.kl_div(log_tuned, log_base, reduction="batchmean", log_target=True)
