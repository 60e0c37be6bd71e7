"""A split where the model's device can reach it: pixels, labels and constants are moved once, not once a batch."""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clipmerge.data.pixels import mean_and_std, normalise
from clipmerge.data.split import Split
from clipmerge.device import keep_on_device, to_device
from clipmerge.types import Ints, Pixels

__all__ = ["DeviceSplit", "Span"]

Span = tuple[int, int]
"""Where a batch begins and ends in an order of images."""

_FREE = 0.3
"""Share of a GPU's memory that pixels leave free for activations."""

_SLOTS = 3
"""Pinned batches: one is filled, one waits, one is copied to the device."""


class DeviceSplit:
    """A split's images as the model sees them, and what turns its features into scores.

    On a GPU the uint8 pixels are copied there once, if they fit, and batches are picked from them there. Otherwise a
    thread reads batches ahead into pinned memory, from which they are copied beside the computation.

    Attributes:
        pixels: (n, 3, H, W) uint8, decoded once. labels: (n,) on the device.
        covered: sets logits of classes that the data lacks to -inf.
    """

    def __init__(
        self, split: Split, pixels: Pixels, preprocess: Mapping[str, Any], device: torch.device
    ) -> None:
        self.pixels = pixels
        self.labels = torch.from_numpy(split.labels).to(device)
        self._device = device
        self.covered = split.covered
        self._mean_and_std = mean_and_std(preprocess, device)
        self._on_device = keep_on_device(pixels, device, free=_FREE)

    def batches(self, order: Ints, spans: Sequence[Span]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (indices, uint8 pixels), both on the device, for each span of `order`."""
        if self._device.type != "cuda":
            yield from self._read_ahead(order, spans)
            return
        index = to_device(order, self._device)
        if self._on_device is not None:
            for start, stop in spans:
                yield index[start:stop], self._on_device[index[start:stop]]
        else:
            for (start, stop), images in zip(spans, self._pinned(order, spans), strict=True):
                yield index[start:stop], images

    def normalise(self, images: Tensor) -> Tensor:
        """Turn uint8 pixels into what the model takes."""
        return normalise(images, *self._mean_and_std)

    def _read_ahead(self, order: Ints, spans: Sequence[Span]) -> Iterator[tuple[Tensor, Tensor]]:
        """Read one batch while the one before is computed."""

        def read(span: Span) -> tuple[Tensor, Tensor]:
            rows = order[slice(*span)]
            return torch.from_numpy(rows), torch.from_numpy(self.pixels[rows])

        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(read, spans[0])
            for i in range(len(spans)):
                rows, images = ahead.result()
                if i + 1 < len(spans):
                    ahead = reader.submit(read, spans[i + 1])
                yield rows.to(self._device), images.to(self._device)

    def _pinned(self, order: Ints, spans: Sequence[Span]) -> Iterator[Tensor]:
        """Read batches into pinned slots and copy them on a stream of their own.

        A slot is written again only after the copy out of it has ended (its event); the computation waits for its
        batch's copy on the device, never on the host.
        """
        largest = max(stop - start for start, stop in spans)
        shape = (largest, *self.pixels.shape[1:])
        slots = [torch.empty(shape, dtype=torch.uint8, pin_memory=True) for _ in range(_SLOTS)]
        copied: list[torch.cuda.Event | None] = [None] * _SLOTS
        main = torch.cuda.current_stream(self._device)
        side = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]

        def read(i: int) -> Tensor:
            event, slot = copied[i % _SLOTS], slots[i % _SLOTS]
            if event is not None:
                event.synchronize()
            rows = order[slice(*spans[i])]
            # mode="clip" lets numpy write into the slot itself; with the default it would fill a buffer first.
            np.take(self.pixels, rows, axis=0, out=slot.numpy()[: len(rows)], mode="clip")
            return slot[: len(rows)]

        with ThreadPoolExecutor(1) as reader:
            ahead = deque(reader.submit(read, i) for i in range(min(_SLOTS - 1, len(spans))))
            for i in range(len(spans)):
                batch = ahead.popleft().result()
                if i + _SLOTS - 1 < len(spans):
                    ahead.append(reader.submit(read, i + _SLOTS - 1))
                with torch.cuda.stream(side):
                    images = batch.to(self._device, non_blocking=True)
                    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                    event.record(side)
                copied[i % _SLOTS] = event
                main.wait_event(event)
                images.record_stream(main)
                yield images
