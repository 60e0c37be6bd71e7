"""The images of a run, as pixels and as features: decoded once on each machine, or augmented at each visit."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from clipmerge.data.pixels import pixels
from clipmerge.data.split import Split
from clipmerge.distributed import first_on_machine_first
from clipmerge.errors import DataError, TrainingError
from clipmerge.finetuning.augment import Augmentation
from clipmerge.finetuning.loader import Loader
from clipmerge.finetuning.settings import Settings
from clipmerge.finetuning.towers import Towers, image_features
from clipmerge.types import Pixels, Progress

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["Images", "check_images", "keep_on_device"]

RESIDENT = 0.25
"""Share of the GPU's free memory that cached pixels may take; beyond it they are copied batch by batch."""


@dataclass(frozen=True)
class Images:
    """Training and held-out images of one model's size.

    Attributes:
        augment: makes pixels of an image at each visit; None trains on the eval transform's pixels.
        batch_size: of features that are computed once.
    """

    train: Split
    val: Split | None
    preprocess: Mapping[str, Any]
    device: torch.device
    augment: Augmentation | None
    batch_size: int = 256
    on_progress: Progress | None = None

    def plain(self) -> Pixels:
        """Return training images through the eval transform, uint8 (n, 3, H, W)."""
        return self._decode(self.train)

    def held_out(self) -> Pixels:
        """Return held-out images through the eval transform."""
        assert self.val is not None
        return self._decode(self.val)

    def _decode(self, split: Split) -> Pixels:
        return first_on_machine_first(lambda: pixels(split, self.preprocess, on_progress=self.on_progress))

    def features(self, towers: Towers, images: Pixels, what: str = "features") -> "Float[Tensor, 'images d']":
        """Return unit features of images, computed once."""
        return image_features(
            towers, images, self.device, self.batch_size, what=what, on_progress=self.on_progress
        )

    def loader(self, seed: int, workers: int | None) -> Loader:
        """Return what yields batches of training pixels."""
        fixed: Pixels | Tensor | None = self.plain() if self.augment is None else None
        if isinstance(fixed, np.ndarray):
            fixed = keep_on_device(fixed, self.device)
        if workers is None:
            workers = _default_workers(self.device)
        return Loader(self.train, self.device, seed, self.augment, fixed, workers)


def keep_on_device(images: Pixels, device: torch.device) -> Pixels | Tensor:
    """Return the images on the GPU if it has ample room for them, else as they are."""
    if device.type != "cuda" or images.nbytes > RESIDENT * torch.cuda.mem_get_info(device)[0]:
        return images
    return torch.from_numpy(np.ascontiguousarray(images)).to(device)


def _default_workers(device: torch.device) -> int:
    """Return one process a core beside a GPU, shared by this machine's ranks; beside training on the CPU none."""
    if device.type != "cuda":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def check_images(settings: Settings, train: Split, val: Split | None) -> None:
    """Refuse images without what the method needs.

    Raises:
        TrainingError: the best checkpoint is asked for without held-out images.
        DataError: no images, no labels (captions do for contrastive training), or other classes held out.
    """
    if settings.select == "best" and val is None:
        raise TrainingError("nothing says which checkpoint is best", hint="give held-out images with --val")
    headless = settings.row.head is None
    if not len(train):
        raise DataError(f"{train.source} has no images", hint="check the part and the limit")
    captioned = headless and train.captions is not None and not train.classes
    if not captioned and not _labelled(train):
        raise DataError(
            f"{train.source} has images without a label",
            hint=f"{settings.method} needs a class for each image",
        )
    if val is not None and not (len(val) and _labelled(val)):
        raise DataError(
            f"{val.source} cannot score: it has no labelled images", hint="name another held-out split"
        )
    if val is not None and not headless and val.classes != train.classes:
        raise DataError(
            f"{val.source} has other classes than {train.source}",
            hint="a trained head scores the classes that it was trained on, in their order",
        )


def _labelled(split: Split) -> bool:
    return bool(split.classes) and bool((split.labels >= 0).all())
