"""Features that are computed once: of frozen towers, of prompts for heads, of images for probes and held-out scores."""

from typing import TYPE_CHECKING, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipmerge.finetuning.batches import Prompts
from clipmerge.types import Progress

if TYPE_CHECKING:
    import numpy.typing as npt
    from jaxtyping import Float

__all__ = ["context_vectors", "image_features", "prompt_features", "zero_shot"]


@torch.no_grad()
def image_features(
    towers: nn.Module,
    pixels: "npt.NDArray[np.uint8] | Tensor",
    device: torch.device,
    batch_size: int,
    *,
    what: str = "features",
    on_progress: Progress | None = None,
) -> "Float[Tensor, 'images d']":
    """Unit features of every image, on the device."""
    found = []
    for start in range(0, len(pixels), batch_size):
        piece = pixels[start : start + batch_size]
        tensor = (
            piece if isinstance(piece, Tensor) else torch.from_numpy(np.ascontiguousarray(piece)).to(device)
        )
        found.append(towers(tensor)[0])
        if on_progress is not None:
            on_progress(what, min(start + batch_size, len(pixels)), len(pixels))
    return torch.cat(found)


@torch.no_grad()
def prompt_features(
    towers: nn.Module, prompts: Prompts, batch_size: int = 256
) -> "Float[Tensor, 'prompts d']":
    """Unit features of every prompt, each once; prompts of similar length together."""
    order = np.argsort(prompts.lengths, kind="stable")
    found: Tensor | None = None
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        index = torch.from_numpy(rows).to(prompts.tokens.device)
        piece = cast("Tensor", towers(None, prompts.tokens[index], int(prompts.lengths[rows].max()))[1])
        if found is None:
            found = piece.new_empty(len(order), piece.shape[1])
        found[index] = piece
    assert found is not None
    return found


def zero_shot(features: "Float[Tensor, 'prompts d']", classes: int) -> "Float[Tensor, 'classes d']":
    """The zero-shot head of class-major unit prompt features: mean over templates, normalised.

    Source: Radford et al. 2021, arXiv 2103.00020.
    """
    return F.normalize(features.view(classes, -1, features.shape[1]).mean(dim=1), dim=-1)


def context_vectors(features: "Float[Tensor, 'prompts d']", classes: int) -> "Float[Tensor, 'contexts d']":
    """CAR-FT's context vectors: mean over classes of each context's unit prompt features, normalised.

    Source: Mao et al. 2022, arXiv 2211.16175.
    """
    return F.normalize(features.view(classes, -1, features.shape[1]).mean(dim=0), dim=-1)
