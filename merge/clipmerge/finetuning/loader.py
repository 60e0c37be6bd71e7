"""Training pixels, on the device before the step asks for them: worker processes, pinned memory, overlapping copies."""

import multiprocessing
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import tee
from time import perf_counter
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipmerge.data.split import Split
from clipmerge.distributed import share
from clipmerge.finetuning.augment import Augmentation
from clipmerge.finetuning.batches import Batch
from clipmerge.types import Ints, Pixels

__all__ = ["Loader", "to_device"]

Key: TypeAlias = tuple[int, int]
"""(epoch, item): all that an image's augmentation depends on, besides the run's seed."""

KEPT_BYTES = 1 << 30
"""Decoded images of a small set are kept up to this size, over all workers; others are decoded at each visit."""


class _Images(Dataset[Tensor | Exception]):
    """Makes whole batches, in a worker process or in this one."""

    def __init__(self, split: Split, seed: int, augment: Augmentation | None, fixed: Any, keep: int) -> None:
        self.split, self.seed, self.augment, self.fixed, self.keep = split, seed, augment, fixed, keep
        self.kept: dict[int, Image] = {}

    def __getitems__(self, keys: list[Key]) -> Tensor | Exception:
        """Return the batch, or what went wrong: raised in a worker, torch would bury it in a traceback's text."""
        try:
            if self.augment is None:
                assert isinstance(self.fixed, np.ndarray)
                return torch.from_numpy(self.fixed[[item for _, item in keys]])
            rows = [self.augment(self._image(item), f"{self.seed}/{epoch}/{item}") for epoch, item in keys]
            return torch.from_numpy(np.stack(rows))
        except Exception as error:
            return error

    def _image(self, item: int) -> Image:
        image = self.kept.get(item)
        if image is None:
            image = self.split.image(item)
            size = image.width * image.height * 3
            if size <= self.keep:
                self.kept[item] = image
                self.keep -= size
        return image


@dataclass
class Loader:
    """uint8 pixels (batch, 3, H, W) of each batch's items on this rank, on the device.

    Order and pixels are a function of (seed, epoch, item): the same for any number of workers.

    Attributes:
        augment: makes pixels of an image at each visit; None takes them from `fixed`.
        fixed: (n, 3, H, W): an array, or a tensor on the device if it fits there.
        workers: processes that decode and augment; 0 does it in this one, between the steps.
        waited: seconds that the training loop has spent waiting for pixels.
    """

    split: Split
    device: torch.device
    seed: int
    augment: Augmentation | None
    fixed: Pixels | Tensor | None = None
    workers: int = 0
    waited: float = field(default=0.0, init=False)

    def __call__(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Tensor]]:
        """Yield each batch with its pixels."""
        if isinstance(self.fixed, Tensor):
            for batch in batches:
                yield batch, self.fixed[to_device(batch.items[share(len(batch.items))], self.device)]
            return
        ahead, batches = tee(batches)
        keys = ([(b.epoch, i) for i in b.items[share(len(b.items))].tolist()] for b in ahead)
        loaded = self._start(keys)
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        for batch in batches:
            began = perf_counter()
            pixels = next(loaded)
            if isinstance(pixels, Exception):
                raise pixels
            pixels = _copy(pixels, self.device, stream)
            self.waited += perf_counter() - began
            yield batch, pixels

    def _start(self, keys: Iterator[list[Key]]) -> Iterator[Tensor | Exception]:
        """Start the worker processes.

        They are forked, which takes milliseconds and works in scripts without a `__main__` guard; they never touch the
        GPU. The loader's own generator keeps it from drawing from the global one, which dropout uses.
        """
        options: dict[str, Any] = {}
        if self.workers and "fork" in multiprocessing.get_all_start_methods():
            options["multiprocessing_context"] = "fork"
        images = _Images(self.split, self.seed, self.augment, self.fixed, KEPT_BYTES // max(1, self.workers))
        with warnings.catch_warnings():
            # More workers than cores are the user's choice; Python 3.12 warns of any fork beside threads.
            warnings.simplefilter("ignore")
            return iter(
                DataLoader(
                    images,
                    batch_sampler=keys,
                    collate_fn=_same,
                    num_workers=self.workers,
                    pin_memory=self.device.type == "cuda",
                    generator=torch.Generator(),
                    **options,
                )
            )


def _same(batch: Any) -> Any:
    return batch


def _copy(pixels: Tensor, device: torch.device, stream: "torch.cuda.Stream | None") -> Tensor:
    """Copy a pinned batch on a stream of its own, beside the kernels of the step before it."""
    if stream is None:
        return pixels.to(device)
    with torch.cuda.stream(stream):
        copied = pixels.to(device, non_blocking=True)
    compute = torch.cuda.current_stream(device)
    compute.wait_stream(stream)
    copied.record_stream(compute)  # so that its memory is not given away before the step has read it
    return copied


def to_device(numbers: Ints, device: torch.device) -> Tensor:
    """Copy a few numbers to the device without waiting for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(numbers))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
