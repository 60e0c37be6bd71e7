"""Take BatchNorm's running statistics of merged weights again, on images.

An average of running statistics is not the statistics of the averaged weights.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from clipmerge.data.open import open_split
from clipmerge.data.pixels import mean_and_std, normalise, pixels
from clipmerge.data.split import Split
from clipmerge.device import resolve_device
from clipmerge.errors import ModelError
from clipmerge.model import ModelSpec, build_model, load_weights, resolve_model
from clipmerge.types import Progress
from clipmerge.weights.record import is_statistic
from clipmerge.weights.weights import Weights

__all__ = ["recalibrate"]


class _BatchNormAlone(nn.Module):
    """A tower of which BatchNorm alone goes into training mode: statistics are taken without dropout."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def train(self, mode: bool = True) -> "_BatchNormAlone":
        super().train(False)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.training = mode
        return self

    def forward(self, images: Tensor) -> Tensor:
        return cast("Tensor", self.tower(images))


def recalibrate(
    weights: Weights,
    data: Split | str | Path,
    *,
    model: ModelSpec | str | Path | None = None,
    batch_size: int = 256,
    device: str | torch.device | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Tensor]:
    """Compute the running means and variances of the image tower's BatchNorm, for `Weights.save(statistics=…)`.

    Each is the plain mean over batches of equal size of what the images give, in eval mode but for BatchNorm.

    Args:
        data: images, without labels where that is all there are; of a path the part "train".
        model: read from the weights' metadata where left out.

    Raises:
        ModelError: the model has no BatchNorm.

    Source: Izmailov et al. 2018, arXiv 1803.05407, section 3.2; torch.optim.swa_utils.update_bn.
    """
    spec = resolve_model(model, weights)
    place = resolve_device(device)
    net: Any = build_model(spec, place)
    names = [name for name in net.state_dict() if is_statistic(name)]
    if not names:
        raise ModelError(
            f"{spec.name} has no BatchNorm, so there is nothing to recalibrate", hint="leave it out"
        )
    split = data if isinstance(data, Split) else open_split(data, role="train", on_progress=on_progress)
    load_weights(net, weights)
    decoded, moments = (
        pixels(split, spec.preprocess, on_progress=on_progress),
        mean_and_std(spec.preprocess, place),
    )
    pieces = np.array_split(np.arange(len(split)), -(-len(split) // batch_size))

    def batches() -> Iterator[Tensor]:
        for done, piece in enumerate(pieces):
            yield normalise(torch.from_numpy(np.ascontiguousarray(decoded[piece])).to(place), *moments)
            if on_progress is not None:
                on_progress("recalibrating", done + 1, len(pieces))

    update_bn(batches(), _BatchNormAlone(net.visual))
    state = net.state_dict()
    return {name: state[name].cpu().clone() for name in names}
