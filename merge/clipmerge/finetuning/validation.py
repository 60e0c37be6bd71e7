"""Held-out scores of the model that trains, as it stands, without leaving the device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from clipmerge.data.split import Split
from clipmerge.distributed import all_reduce_sum, rank, world
from clipmerge.evaluate.heads import average_templates, class_logits
from clipmerge.finetuning.prompts import Prompts
from clipmerge.finetuning.towers import HEAD, Towers, image_features
from clipmerge.types import Pixels

__all__ = ["held_out_scores"]


@torch.no_grad()
def held_out_scores(
    towers: Towers, split: Split, pixels: Pixels | Tensor, prompts: Prompts, batch_size: int
) -> dict[str, float]:
    """Return accuracy ("top1") and mean cross-entropy ("loss") of the trained head, or of the zero-shot head as it is.

    Every rank scores a share. All shares are of equal length, because the ranks of a sharded model must call it equally
    often; the last ones begin earlier instead of reaching beyond the end, and skip what the rank before them counts.
    """
    modes = {module: module.training for module in towers.modules()}
    towers.eval()
    size = -(-len(split) // world())
    start = min(rank() * size, len(split) - size)
    counted = slice(min(rank() * size, len(split)), start + size)
    device = towers.mean.device
    images = image_features(towers, pixels[start : start + size], device, batch_size)
    head = None
    if not hasattr(towers.model, HEAD):
        head = average_templates(towers.prompt_features(prompts.tokens), prompts.classes)
    logits = split.covered(class_logits(towers.model, images, head))[counted.start - start :]
    for module, mode in modes.items():
        module.training = mode  # a frozen tower was in eval mode and stays there
    labels = torch.from_numpy(split.labels[counted]).to(device)
    right = (logits.argmax(dim=1) == labels).sum()
    loss = F.cross_entropy(logits, labels, reduction="sum")
    top1, loss = (all_reduce_sum(torch.stack([right.double(), loss.double()])) / len(split)).tolist()
    return {"top1": top1, "loss": loss}
