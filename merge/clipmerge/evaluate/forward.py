"""Images through the resident model: batches in any order, shared between processes, stopped when certain."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipmerge import distributed
from clipmerge.data.pixels import mean_and_std, normalise
from clipmerge.errors import NonFiniteError
from clipmerge.evaluate.metrics import Predictions

if TYPE_CHECKING:
    from clipmerge.data.split import Split
    from clipmerge.evaluate.resident import Resident

__all__ = ["Forward", "Head", "Partial"]

Order = npt.NDArray[np.int64]
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
_PASSES = 16
"""A small split is still cut into so many batches, so that stopping early has somewhere to stop."""
_LEAST = 32


@dataclass(frozen=True, eq=False)
class Head:
    """What turns normalised image features into logits.

    Attributes:
        weight: (classes, d). bias: (classes,) or None.
        zero_shot: rows are normalised prompts; logits take the model's logit_scale and logit_bias.
    """

    weight: Tensor
    bias: Tensor | None
    zero_shot: bool

    @classmethod
    def trained(cls, module: nn.Module) -> "Head | None":
        """The model's own classification head, None where it has none."""
        head = getattr(module, "classification_head", None)
        return None if head is None else cls(head.weight, head.bias, zero_shot=False)

    def logits(self, features: Tensor, module: nn.Module) -> Tensor:
        """(batch, classes) in fp32."""
        out = F.linear(features, self.weight, self.bias)
        if self.zero_shot:
            model = cast("Any", module)
            out = out * model.logit_scale.exp()
            bias = getattr(model, "logit_bias", None)
            out = out if bias is None else out + bias
        return out


@dataclass(frozen=True, eq=False)
class Partial:
    """A pass that may have been stopped.

    Attributes:
        predictions: of all n images; where an image was not judged, they take it as right.
        judged: shape (n,): which images went through the model.
    """

    predictions: Predictions
    judged: npt.NDArray[np.bool_]

    @property
    def seen(self) -> int:
        return int(self.judged.sum())

    @property
    def complete(self) -> bool:
        return bool(self.judged.all())


@dataclass(frozen=True, eq=False)
class Forward:
    """One model, one split, one head: ready to run."""

    resident: "Resident"
    pixels: npt.NDArray[np.uint8]
    split: "Split"
    head: Head | None
    preprocess: Mapping[str, Any]
    precision: str
    batch_size: int
    name: str = "images"
    on_progress: Callable[[str, int, int], None] | None = None

    def predict(
        self, order: Order | None = None, hopeless: Callable[[Predictions], bool] | None = None
    ) -> Partial:
        """Predictions for the images, in `order`, until `hopeless` says that the rest cannot matter.

        Args:
            hopeless: asked after each batch about predictions in which every image not yet judged is right.
        """
        n = len(self.split)
        labels = self.split.labels
        said = Predictions(labels, labels.copy(), np.ones(n, bool), np.ones(n), self.split.groups)
        judged = np.zeros(n, bool)
        for chunk, found in self._chunks(order, self._reduce, 3):
            columns = found.numpy()
            said.predicted[chunk] = columns[:, 0].astype(np.int64)
            said.in_top5[chunk] = columns[:, 1] > 0
            said.confidence[chunk] = columns[:, 2]
            judged[chunk] = True
            if hopeless is not None and hopeless(said):
                break
        return Partial(said, judged)

    def collect(self, what: Literal["logits", "features"]) -> Tensor:
        """Logits or normalised features of every image, shape (n, classes or d), fp32 on the CPU."""
        if what == "features":
            make, width = self._features, _width(self.resident.module, self.pixels)
        else:
            make, width = self._masked, len(cast("Head", self.head).weight)
        rows = torch.empty(len(self.split), width)
        for chunk, found in self._chunks(None, make, width):
            rows[torch.from_numpy(chunk)] = found.float()
        return rows

    @cached_property
    def _mean_and_std(self) -> tuple[Tensor, Tensor]:
        return mean_and_std(self.preprocess, self.resident.device)

    # -- one batch ----------------------------------------------------------------------------------------

    def _features(self, indices: Order, images: Tensor) -> Tensor:
        ready = normalise(images, *self._mean_and_std)
        with self._autocast():
            features = cast("Any", self.resident.module).encode_image(ready, normalize=False)
        return F.normalize(features.float(), dim=-1)

    def _logits(self, indices: Order, images: Tensor) -> Tensor:
        head = cast("Head", self.head)
        logits = head.logits(self._features(indices, images), self.resident.module)
        if not torch.isfinite(logits).all():
            raise NonFiniteError(
                f"the model's logits for {self.name} are not finite",
                hint="the weights hold NaN or infinity, or --precision fp16 overflows: try bf16 or fp32",
            )
        return logits

    def _masked(self, indices: Order, images: Tensor) -> Tensor:
        """Logits in which classes that the data does not cover are -inf."""
        return self.split.covered(self._logits(indices, images))

    def _reduce(self, indices: Order, images: Tensor) -> Tensor:
        """(batch, 3): predicted class, whether the true one is among the top five, confidence."""
        logits = self._masked(indices, images).to(_wide(self.resident.device))
        labels = torch.from_numpy(self.split.labels[indices]).to(logits.device)
        confidence, predicted = logits.softmax(dim=-1).max(dim=-1)
        own = logits.gather(1, labels[:, None])
        in_top5 = (logits > own).sum(dim=-1) < 5
        predicted = logits.argmax(dim=-1)
        return torch.stack([predicted.to(confidence), in_top5.to(confidence), confidence], dim=-1)

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "fp32":
            return nullcontext()
        return torch.autocast(torch.device(self.resident.device).type, _AUTOCAST[self.precision])

    # -- all batches --------------------------------------------------------------------------------------

    def _chunks(
        self, order: Order | None, make: Callable[[Order, Tensor], Tensor], width: int
    ) -> Iterator[tuple[Order, Tensor]]:
        """(image indices, rows for them, the same in every process), chunk by chunk."""
        n, device = len(self.split), self.resident.device
        order = np.arange(n) if order is None else order
        size = batch_of(n, self.batch_size, device)
        step, rank = size * distributed.world(), distributed.rank()
        chunks = [order[start : start + step] for start in range(0, n, step)]
        mine = [chunk[rank * size : (rank + 1) * size] for chunk in chunks]
        done = 0
        with ThreadPoolExecutor(1) as reader:
            ahead = reader.submit(self._read, mine[0])
            for i, chunk in enumerate(chunks):
                images = ahead.result().to(device, non_blocking=True)
                if i + 1 < len(chunks):
                    ahead = reader.submit(self._read, mine[i + 1])
                with torch.inference_mode():  # not around the yield: it would hold for whoever asks
                    rows = torch.zeros(len(chunk), width, dtype=_wide(device), device=device)
                    if len(mine[i]):
                        rows[rank * size : rank * size + len(mine[i])] = make(mine[i], images).to(rows)
                    found = distributed.all_reduce_sum(rows).cpu()
                yield chunk, found
                done += len(chunk)
                if self.on_progress:
                    self.on_progress(f"scoring {self.name}", done, n)

    def _read(self, indices: Order) -> Tensor:
        """The images' pixels, (batch, 3, H, W) uint8, in memory that a GPU can fetch from by itself."""
        images = torch.from_numpy(self.pixels[indices])
        return images.pin_memory() if self.resident.device.startswith("cuda") else images


def batch_of(n: int, at_most: int, device: str) -> int:
    """Images in one batch. A CPU gains nothing from large ones, a search gains from places to stop."""
    if not device.startswith("cpu"):
        return at_most
    return min(at_most, max(_LEAST, -(-n // _PASSES)))


def _wide(device: str) -> torch.dtype:
    """fp64, where the device has it."""
    return torch.float32 if device.startswith("mps") else torch.float64


def _width(module: nn.Module, pixels: npt.NDArray[np.uint8]) -> int:
    """The width of the image features."""
    model = cast("Any", module)
    width = getattr(model.visual, "output_dim", None)
    if isinstance(width, int):
        return width
    with torch.inference_mode():
        image = torch.zeros(1, *pixels.shape[1:], device=next(module.parameters()).device)
        return int(model.encode_image(image).shape[-1])
