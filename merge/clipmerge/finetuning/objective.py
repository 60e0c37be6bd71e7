"""From a batch to gradients: the two objectives that every method is made of, and what stays frozen beside them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipmerge.distributed import gather, rank, world
from clipmerge.finetuning import gradient_cache, losses
from clipmerge.finetuning.batches import Batch, Ints, Prompts, distinct
from clipmerge.finetuning.towers import HEAD, Towers

__all__ = ["Classification", "Contrastive", "Objective"]

Scale = Callable[[Tensor], Tensor]


class Objective(Protocol):
    """Adds the gradients of one micro-batch and returns its loss, detached."""

    def backward(self, batch: Batch, pixels: Tensor, scale: Scale) -> Tensor: ...


@dataclass
class Contrastive:
    """Images against the prompts drawn for them: CLIP's pretraining, FLYP, LiT.

    Distinct prompts of the batch are encoded once, a share on each rank, and gathered; a frozen tower's features
    are looked up where they could be computed once.

    Attributes:
        towers, module: the towers, and the towers as this world wraps them.
        image_table, text_table: features by item or by prompt, of a tower that does not train.
        chunk: pieces of so many images or prompts, the exact loss over all of them; None encodes all at once.
        multiple: distinct prompts are padded to a multiple of this (compiled kernels like few shapes).
    """

    towers: Towers
    module: nn.Module
    prompts: Prompts
    trains_image: bool = True
    trains_text: bool = True
    image_table: Tensor | None = None
    text_table: Tensor | None = None
    label_smoothing: float = 0.0
    multi_positive: bool = False
    chunk: int | None = None
    multiple: int = 1

    def backward(self, batch: Batch, pixels: Tensor, scale: Scale) -> Tensor:
        device = pixels.device
        rows, where = distinct(batch.prompts, world(), self.multiple)
        share = len(rows) // world()
        mine = rows[rank() * share : (rank() + 1) * share]
        tokens = self.prompts.tokens[on(mine, device)]
        length = int(self.prompts.lengths[rows].max())
        target = on(where, device)
        groups = (
            on(batch.labels if self.prompts.classes else batch.prompts, device)
            if self.multi_positive
            else None
        )

        def loss(image: Tensor, text: Tensor) -> Tensor:
            text = (
                self._drawn(batch, device)
                if self.text_table is not None
                else F.embedding(target, gather(text))
            )
            exp_scale = cast("Tensor", self.towers.model.logit_scale).exp()
            return losses.contrastive(
                gather(image), text, exp_scale, groups=groups, label_smoothing=self.label_smoothing
            )

        if self.chunk is not None:
            return self._in_pieces(pixels, tokens, length, batch, loss, scale)
        image, text = self._encoded(batch, pixels, tokens, length)
        value = loss(image, text)
        scale(value).backward()  # type: ignore[no-untyped-call]
        return value.detach()

    def _encoded(self, batch: Batch, pixels: Tensor, tokens: Tensor, length: int) -> tuple[Tensor, Tensor]:
        if self.trains_image and self.trains_text:
            return cast("tuple[Tensor, Tensor]", self.module(pixels, tokens, length))
        if self.trains_image:
            image, _ = self.module(pixels)
            return image, image
        _, text = self.module(None, tokens, length)
        return self._frozen_images(batch, pixels), text

    def _frozen_images(self, batch: Batch, pixels: Tensor) -> Tensor:
        if self.image_table is not None:
            size = len(batch.items) // world()
            return self.image_table[on(batch.items[rank() * size : (rank() + 1) * size], pixels.device)]
        with torch.no_grad():
            return cast("Tensor", self.towers(pixels)[0])

    def _drawn(self, batch: Batch, device: torch.device) -> Tensor:
        assert self.text_table is not None
        return self.text_table[on(batch.prompts, device)]

    def _in_pieces(
        self,
        pixels: Tensor,
        tokens: Tensor,
        length: int,
        batch: Batch,
        loss: Callable[[Tensor, Tensor], Tensor],
        scale: Scale,
    ) -> Tensor:
        assert self.chunk is not None
        images = [_call(self.module, (piece,), 0) for piece in torch.split(pixels, self.chunk)]
        texts = [_call(self.module, (None, piece, length), 1) for piece in torch.split(tokens, self.chunk)]
        if self.trains_image and self.trains_text:
            return gradient_cache.backward([images, texts], lambda f: loss(f[0], f[1]), scale=scale)
        if self.trains_image:
            return gradient_cache.backward([images], lambda f: loss(f[0], f[0]), scale=scale)
        frozen = self._frozen_images(batch, pixels)
        return gradient_cache.backward([texts], lambda f: loss(frozen, f[0]), scale=scale)


def _call(module: nn.Module, arguments: tuple[Any, ...], side: int) -> Callable[[], Tensor]:
    return lambda: cast("Tensor", module(*arguments)[side])


@dataclass
class Classification:
    """A trained head over image features: CE, LP-FT's second stage, and CAR-FT with its term.

    Attributes:
        contexts: CAR-FT's frozen context vectors; None leaves the term out.
        base: the frozen base's image tower; base_table: its features by item, where nothing is random.
        mixup: α of the Beta distribution that mixes images; 0 mixes nothing.
    """

    towers: Towers
    module: nn.Module
    seed: int
    label_smoothing: float = 0.0
    mixup: float = 0.0
    contexts: Tensor | None = None
    context_scale: float = 1.0
    context_weight: float = 1.0
    base: Towers | None = None
    base_table: Tensor | None = None

    def backward(self, batch: Batch, pixels: Tensor, scale: Scale) -> Tensor:
        size = len(batch.items) // world()
        at = slice(rank() * size, (rank() + 1) * size)
        labels = on(batch.labels[at], pixels.device)
        partners, weight = labels, 1.0
        if self.mixup:
            pixels, partners, weight = self._mixed(batch, pixels, labels)
        image = cast("Tensor", self.module(pixels)[0])
        logits = cast("nn.Linear", getattr(self.towers.model, HEAD))(image)
        value = losses.mixed(logits, labels, partners, weight, label_smoothing=self.label_smoothing) if self.mixup \
            else losses.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)  # fmt: skip
        if self.contexts is not None:
            before = self._base_features(on(batch.items[at], pixels.device), pixels)
            term = losses.context_divergence(image, before, self.contexts, self.context_scale)
            value = value + self.context_weight * term
        scale(value).backward()  # type: ignore[no-untyped-call]
        return value.detach()

    def _base_features(self, items: Tensor, pixels: Tensor) -> Tensor:
        if self.base_table is not None and not self.mixup:
            return self.base_table[items]
        assert self.base is not None
        with torch.no_grad():
            return cast("Tensor", self.base(pixels)[0])

    def _mixed(self, batch: Batch, pixels: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, float]:
        generator = np.random.default_rng([self.seed, batch.step, int(batch.items[0]), rank()])
        weight = float(generator.beta(self.mixup, self.mixup))
        partner = on(generator.permutation(len(pixels)), pixels.device)
        scaled = pixels.float()
        return weight * scaled + (1 - weight) * scaled[partner], labels[partner], weight


def on(numbers: Ints, device: torch.device) -> Tensor:
    """The numbers on the device, without waiting for it."""
    tensor = torch.from_numpy(np.ascontiguousarray(numbers))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
