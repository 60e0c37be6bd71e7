"""Pixels on the device before the step asks for them: decode threads, pinned memory, copies that overlap."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from clipmerge.finetuning.batches import Batch

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from clipmerge.data.split import Split
    from clipmerge.finetuning.augment import Augmenter

__all__ = ["Loader"]

Pixels = npt.NDArray[np.uint8]
KEPT_BYTES = 1 << 30
"""Decoded images of a small set are kept up to this size; what is beyond it is decoded at each visit."""


@dataclass
class Loader:
    """uint8 pixels (batch, 3, H, W) of each batch's items on this rank, on the device.

    Attributes:
        fixed: (n, 3, H, W) where nothing is random: an array, or a tensor on the device if it fits there.
        augment: what makes pixels of an image otherwise.
        waited: seconds that the training loop has spent waiting for pixels.
    """

    split: "Split"
    device: torch.device
    seed: int
    fixed: "Pixels | Tensor | None" = None
    augment: "Augmenter | None" = None
    workers: int = 0
    ahead: int = 3
    rank: int = 0
    ranks: int = 1
    waited: float = 0.0
    _images: dict[int, "Image.Image"] = field(default_factory=dict)
    _kept: int = 0

    def mine(self, batch: Batch) -> npt.NDArray[np.int64]:
        """This rank's items of a batch over all ranks."""
        size = len(batch.items) // self.ranks
        return batch.items[self.rank * size : (self.rank + 1) * size]

    def __call__(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, "Tensor"]]:
        """Each batch with its pixels, a few batches ahead of the step."""
        if isinstance(self.fixed, torch.Tensor):
            yield from self._resident(self.fixed, batches)
            return
        if self.workers == 0:
            for batch in batches:
                began = perf_counter()
                pixels = self._moved([self._piece(batch, self.mine(batch))])
                self.waited += perf_counter() - began
                yield batch, pixels
            return
        yield from self._threaded(batches)

    def _resident(self, fixed: "Tensor", batches: Iterable[Batch]) -> Iterator[tuple[Batch, "Tensor"]]:
        for batch in batches:
            items = torch.from_numpy(self.mine(batch))
            if self.device.type == "cuda":
                items = items.pin_memory().to(self.device, non_blocking=True)
            yield batch, fixed[items]

    def _threaded(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, "Tensor"]]:
        source = iter(batches)
        waiting: deque[tuple[Batch, list[Future[Pixels]]]] = deque()
        with ThreadPoolExecutor(self.workers, thread_name_prefix="decode") as pool:
            try:
                for batch in islice(source, self.ahead):
                    waiting.append((batch, self._submit(pool.submit, batch)))
                while waiting:
                    batch, pieces = waiting.popleft()
                    began = perf_counter()
                    pixels = self._moved([piece.result() for piece in pieces])
                    self.waited += perf_counter() - began
                    for later in islice(source, 1):
                        waiting.append((later, self._submit(pool.submit, later)))
                    yield batch, pixels
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _submit(self, submit: Callable[..., Future[Pixels]], batch: Batch) -> list[Future[Pixels]]:
        items = self.mine(batch)
        return [
            submit(self._piece, batch, piece) for piece in np.array_split(items, self.workers) if len(piece)
        ]

    def _piece(self, batch: Batch, items: npt.NDArray[np.int64]) -> Pixels:
        if self.fixed is not None:
            assert isinstance(self.fixed, np.ndarray)
            return self.fixed[items]
        assert self.augment is not None
        return np.stack(
            [self.augment(self._image(i), f"{self.seed}/{batch.epoch}/{i}") for i in items.tolist()]
        )

    def _image(self, i: int) -> "Image.Image":
        kept = self._images.get(i)
        if kept is not None:
            return kept
        image = self.split.image(i)
        size = image.width * image.height * 3
        if self._kept + size <= KEPT_BYTES:
            self._images[i] = image
            self._kept += size
        return image

    def _moved(self, pieces: list[Pixels]) -> "Tensor":
        whole = torch.from_numpy(pieces[0] if len(pieces) == 1 else np.concatenate(pieces))
        if self.device.type != "cuda":
            return whole.to(self.device)
        return whole.pin_memory().to(self.device, non_blocking=True)
