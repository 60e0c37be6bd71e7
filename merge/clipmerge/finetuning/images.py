"""The images of a run, as pixels: cached where nothing is random, augmented at each visit otherwise."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from clipmerge.finetuning.loader import Loader
from clipmerge.types import Progress

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from clipmerge.data.split import Split
    from clipmerge.finetuning.augment import Augmenter

__all__ = ["Images", "Pixels"]

Pixels = npt.NDArray[np.uint8]
RESIDENT = 0.25
"""Share of the GPU's free memory that cached pixels may take; beyond it they are copied batch by batch."""


@dataclass(frozen=True)
class Images:
    """Training and held-out images of one model's size.

    Attributes:
        augment: makes pixels of an image at each visit; None trains on the eval transform's pixels, decoded once.
    """

    train: "Split"
    val: "Split | None"
    preprocess: "Mapping[str, Any]"
    device: torch.device
    augment: "Augmenter | None"
    on_progress: Progress | None = None

    def plain(self) -> Pixels:
        """Training images through the eval transform, decoded once, uint8 (n, 3, H, W)."""
        return self._pixels(self.train)

    def held_out(self) -> Pixels:
        """Held-out images through the eval transform."""
        assert self.val is not None
        return self._pixels(self.val)

    def _pixels(self, split: "Split") -> Pixels:
        from clipmerge.data.pixels import pixels

        return pixels(split, self.preprocess, on_progress=self.on_progress)

    def loader(self, seed: int, *, workers: int | None, rank: int, ranks: int) -> Loader:
        """Batches of training pixels for one rank."""
        fixed: Pixels | Tensor | None = self.plain() if self.augment is None else None
        if fixed is not None and self.device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(self.device)
            if fixed.nbytes <= RESIDENT * free:
                fixed = torch.from_numpy(np.ascontiguousarray(fixed)).to(self.device)
        return Loader(
            self.train, self.device, seed, fixed, self.augment, self._workers(workers), rank=rank, ranks=ranks
        )

    def _workers(self, workers: int | None) -> int:
        """Beside a GPU one thread a core, shared by the processes of this machine; beside CPU training none."""
        if workers is not None:
            return workers
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return max(1, min(16, (os.cpu_count() or 1) // local)) if self.device.type == "cuda" else 0
