"""From a batch to gradients: the two objectives that every method is made of, and what stays frozen beside them.

Every rank knows the whole batch, encodes its share of the images and of the distinct prompts, and gathers the other
ranks' features; so every rank computes the same loss over the same rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeAlias, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clipmerge.device import to_device
from clipmerge.distributed import gather, rank, share, world
from clipmerge.evaluate.heads import class_logits
from clipmerge.finetuning import losses
from clipmerge.finetuning.batches import Batch, Prompts, unique_prompts
from clipmerge.finetuning.settings import Settings
from clipmerge.finetuning.state import generators, restore_generators
from clipmerge.finetuning.towers import Towers

__all__ = ["BaseContexts", "Classification", "Contrastive", "Objective", "cached_backward"]

Scale: TypeAlias = Callable[[Tensor], Tensor]


class Objective(Protocol):
    """Adds the gradients of one micro-batch and returns its loss, detached.

    `pixels` are this rank's share of the batch. `scale` is applied to the loss before its backward pass.
    """

    module: nn.Module

    def backward(self, batch: Batch, pixels: Tensor, scale: Scale) -> Tensor: ...


@dataclass
class Contrastive:
    """Images against the prompts drawn for them: CLIP's pretraining, FLYP, LiT.

    Attributes:
        image_table: features by item, of an image tower that does not train and sees nothing random.
        text_table: features by prompt, of a text tower that does not train.
        module: the towers as this world wraps them.
    """

    towers: Towers
    prompts: Prompts
    settings: Settings
    image_table: Tensor | None = None
    text_table: Tensor | None = None
    module: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.module = self.towers
        self.trains_image, self.trains_text = self.settings.towers != "text", self.settings.towers != "image"

    def backward(self, batch: Batch, pixels: Tensor, scale: Scale) -> Tensor:
        device = pixels.device
        # Each distinct prompt is encoded once, a share of them on each rank, cut at the longest of all of them.
        multiple = 64 if self.settings.compile else 1  # compiled kernels like few shapes
        unique, positions = unique_prompts(batch.prompts, world(), multiple)
        tokens = self.prompts.tokens[to_device(unique[share(len(unique))], device)]
        length = int(self.prompts.lengths[unique].max())
        prompt_of_image = to_device(positions, device)
        groups = None
        if self.settings.multi_positive:
            groups = to_device(batch.labels if self.prompts.classes else batch.prompts, device)

        def loss(image: Tensor, text: Tensor | None) -> Tensor:
            if text is None:
                assert self.text_table is not None
                text_of_image = self.text_table[to_device(batch.prompts, device)]
            else:
                # Images that drew the same prompt share its row: the lookup's gradient is the sum over them.
                text_of_image = F.embedding(prompt_of_image, gather(text))
            return losses.contrastive(
                gather(image),
                text_of_image,
                self.towers.exp_scale,
                groups=groups,
                label_smoothing=self.settings.label_smoothing,
            )

        if self.settings.chunk is not None:
            return self._in_pieces(batch, pixels, tokens, length, loss, scale)
        image, text = self.module(
            pixels if self.trains_image else None, *((tokens, length) if self.trains_text else ())
        )
        if self.module is self.towers and self.trains_image and self.trains_text:
            return _backward_images_first(image, text, loss, scale)
        value = loss(image if self.trains_image else self._frozen_images(batch, pixels), text)
        scale(value).backward()  # type: ignore[no-untyped-call]
        return value.detach()

    def _frozen_images(self, batch: Batch, pixels: Tensor) -> Tensor:
        if self.image_table is not None:
            return self.image_table[to_device(batch.items[share(len(batch.items))], pixels.device)]
        with torch.no_grad():
            return cast("Tensor", self.towers(pixels)[0])

    def _in_pieces(
        self,
        batch: Batch,
        pixels: Tensor,
        tokens: Tensor,
        length: int,
        loss: Callable[[Tensor, Tensor | None], Tensor],
        scale: Scale,
    ) -> Tensor:
        size = self.settings.chunk
        assert size is not None
        images = [partial(self._encode, 0, piece) for piece in torch.split(pixels, size)]
        texts = [partial(self._encode, 1, None, piece, length) for piece in torch.split(tokens, size)]
        if self.trains_image and self.trains_text:
            return cached_backward([images, texts], lambda f: loss(f[0], f[1]), pixels.device, scale=scale)
        if self.trains_image:
            return cached_backward([images], lambda f: loss(f[0], None), pixels.device, scale=scale)
        frozen = self._frozen_images(batch, pixels)
        return cached_backward([texts], lambda f: loss(frozen, f[0]), pixels.device, scale=scale)

    def _encode(self, side: int, *inputs: Tensor | int | None) -> Tensor:
        return cast("Tensor", self.module(*inputs)[side])


def _backward_images_first(
    image: Tensor, text: Tensor, loss: Callable[[Tensor, Tensor], Tensor], scale: Scale
) -> Tensor:
    """Send the loss's gradients through the image tower, then through the text tower; return the loss, detached.

    The gradients are those of one backward pass, which would take the tower that was encoded last first. A few short
    prompts are many small kernels: launching them takes longer than running them, and hides only behind the images'
    large ones, in both directions (ViT-B/32, batch 512 on an H200: 77 ms a step, 81 by one pass, 86 with text first).
    A wrapper that averages gradients expects one pass and gets it.
    """
    features = [image.detach().requires_grad_(), text.detach().requires_grad_()]
    value = loss(features[0], features[1])
    scale(value).backward()  # type: ignore[no-untyped-call]
    for encoded, feature in zip((image, text), features, strict=True):
        encoded.backward(feature.grad)  # type: ignore[no-untyped-call]
    return value.detach()


@dataclass
class BaseContexts:
    """CAR-FT's frozen side, whose context distribution is kept.

    Attributes:
        vectors: one unit vector for each context.
        scale: the base's exp(logit_scale).
        towers: the base's, frozen; `table` its image features by item, where nothing is random.
    """

    vectors: Tensor
    scale: float
    towers: Towers
    table: Tensor | None = None


@dataclass
class Classification:
    """A head over image features: CE, LP-FT's second stage, and CAR-FT with its term.

    Attributes:
        frozen: the zero-shot head, where that is kept; None: the model's own head trains.
    """

    towers: Towers
    settings: Settings
    base: BaseContexts | None = None
    frozen: Tensor | None = None
    module: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.module = self.towers

    def backward(self, batch: Batch, pixels: Tensor, scale: Scale) -> Tensor:
        own = share(len(batch.items))
        labels = to_device(batch.labels[own], pixels.device)
        mixed = None
        if self.settings.mixup:
            pixels, mixed = self._mix(batch, pixels, labels)
        image = cast("Tensor", self.module(pixels)[0])
        logits = class_logits(self.towers.model, image, self.frozen)
        value = losses.cross_entropy(
            logits, labels, mixed=mixed, label_smoothing=self.settings.label_smoothing
        )
        if self.base is not None:
            if self.base.table is not None:
                before = self.base.table[to_device(batch.items[own], pixels.device)]
            else:
                with torch.no_grad():
                    before = self.base.towers(pixels)[0]
            term = losses.context_divergence(image, before, self.base.vectors, self.base.scale)
            value = value + self.settings.car_weight * term
        scale(value).backward()  # type: ignore[no-untyped-call]
        return value.detach()

    def _mix(self, batch: Batch, pixels: Tensor, labels: Tensor) -> tuple[Tensor, tuple[Tensor, float]]:
        """Mix each image with a partner of this rank, all with one weight, drawn from the seed and the batch."""
        generator = np.random.default_rng([self.settings.seed, batch.step, int(batch.items[0]), rank()])
        weight = float(generator.beta(self.settings.mixup, self.settings.mixup))
        partner = to_device(generator.permutation(len(pixels)), pixels.device)
        scaled = pixels.float()
        return weight * scaled + (1 - weight) * scaled[partner], (labels[partner], weight)


Encode: TypeAlias = Callable[[], Tensor]


def cached_backward(
    towers: Sequence[Sequence[Encode]],
    loss: Callable[[list[Tensor]], Tensor],
    device: torch.device,
    *,
    scale: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """Return the loss; its gradients are added to the parameters: for batches larger than memory, piece by piece.

    First pass: every piece is encoded without a graph, and its features are kept. The loss over all features gives the
    gradient of each feature. Second pass: every piece is encoded again, with its graph and with the random numbers of
    the first pass (dropout must repeat), and its features' gradient is sent back through it.
    Source: Gao et al. 2021, arXiv 2101.06983.

    Args:
        towers: for each tower its pieces; a piece's call encodes it.
        loss: takes one tensor of features for each tower, pieces joined.
        scale: what is done to the loss before its backward pass (a gradient scaler's multiplication).
    """
    features, first_pass = [], []
    for pieces in towers:
        states, encoded = [], []
        for encode in pieces:
            states.append(generators(device))
            with torch.no_grad():
                encoded.append(encode())
        features.append(torch.cat(encoded).requires_grad_())
        first_pass.append((pieces, states, [len(rows) for rows in encoded]))
    value = loss(features)
    scale(value).backward()  # type: ignore[no-untyped-call]  # reaches logit_scale, and stops at the features
    after = generators(device)
    for feature, (pieces, states, sizes) in zip(features, first_pass, strict=True):
        assert feature.grad is not None
        for encode, state, gradient in zip(pieces, states, torch.split(feature.grad, sizes), strict=True):
            restore_generators(state)
            torch.autograd.backward(encode(), gradient)
    restore_generators(after)
    return value.detach()
