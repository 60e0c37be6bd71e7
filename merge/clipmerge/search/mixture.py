"""A mixture of checkpoints that knows the gradient of its loss with respect to each share."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from clipmerge import distributed
from clipmerge.data.pixels import mean_and_std, normalise
from clipmerge.data.prompts import prompts
from clipmerge.errors import SelectionError
from clipmerge.evaluate.heads import encode_text, zero_shot_head
from clipmerge.evaluate.resident import tensors_of
from clipmerge.model import get_tokenizer
from clipmerge.weights.names import tower_of
from clipmerge.weights.weights import Weights

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    from clipmerge.evaluate.evaluator import Evaluator

MOST_PROMPTS = 2048
"""Prompts that a step can be asked to send gradients through, where the text towers differ."""


class Mixture:
    """Σ share · checkpoint in one set of parameters, recomputed from mapped files at each step.

    Under torchrun each process takes its part of every batch, and gradients are added up.

    Attributes:
        groups, models: how many rows and columns the shares have. size: images.
    """

    def __init__(
        self,
        evaluator: "Evaluator",
        split: str,
        weights: Sequence[Weights],
        groups: Mapping[str, Callable[[str], bool]],
    ) -> None:
        self.weights = tuple(weights)
        self.groups, self.models = len(groups), len(weights)
        self.size = len(evaluator.splits[split])
        self._device = evaluator.resident.device
        self._pixels = evaluator.pixels(split)
        self._labels = torch.from_numpy(evaluator.labels(split))
        self._covered = evaluator.splits[split].covered
        self._mean_and_std = mean_and_std(evaluator.model.preprocess, self._device)
        module = evaluator.resident.module
        with tensors_of(self.weights[0]) as found:
            floats = {name: tensor.shape for name, tensor in found if tensor.is_floating_point()}
        known = module.state_dict()
        self._group = {n: next(i for i, owns in enumerate(groups.values()) if owns(n)) for n in floats}
        self._mixed = {
            name: torch.empty(shape, dtype=torch.float32, device=self._device)
            for name, shape in floats.items()
            if name in known
        }
        self._logits = _Logits(module, *_head_of(evaluator, split, self.weights))

    def gradients(
        self, shares: "Float[Tensor, 'groups models']", beta: float, indices: "Int[Tensor, ' batch']"
    ) -> "tuple[Float[Tensor, 'groups models'], float, float]":
        """The loss's gradient by share and by temperature, and the loss, over a batch.

        Args:
            shares: rows sum to 1. indices: into the split's images.
        """
        sums = torch.zeros(shares.numel() + 2, dtype=torch.float64)
        mine = indices[distributed.rank() :: distributed.world()]
        if len(mine):
            self._mix(shares)
            found = self._backward(beta, mine, len(indices))
            sums[:-2] = self._by_share(found[0]).flatten()
            sums[-2], sums[-1] = found[1], found[2]
        sums = distributed.all_reduce_sum(sums.to(self._device)).cpu()
        return sums[:-2].view_as(shares).float(), float(sums[-2]), float(sums[-1])

    def _mix(self, shares: "Float[Tensor, 'groups models']") -> None:
        for tensor in self._mixed.values():
            tensor.zero_()
        for column, candidate in enumerate(self.weights):
            with torch.no_grad(), tensors_of(candidate) as found:
                for name, tensor in found:
                    if name in self._mixed:
                        there = tensor.to(device=self._device, dtype=torch.float32)
                        self._mixed[name].add_(there, alpha=float(shares[self._group[name], column]))

    def _backward(self, beta: float, mine: Tensor, batch: int) -> tuple[dict[str, Tensor], float, float]:
        leaves = {name: nn.Parameter(tensor) for name, tensor in self._mixed.items()}
        factor = torch.tensor(beta, device=self._device, requires_grad=True)
        images = torch.from_numpy(np.ascontiguousarray(self._pixels[mine.numpy()])).to(self._device)
        ready = normalise(images, *self._mean_and_std)
        named: dict[str, Tensor] = {f"model.{name}": leaf for name, leaf in leaves.items()}
        logits = functional_call(self._logits, named, (ready,))
        labels = self._labels[mine].to(self._device)
        loss = F.cross_entropy(self._covered(factor * logits), labels, reduction="sum") / batch
        found = torch.autograd.grad(loss, [factor, *leaves.values()], allow_unused=True)
        by_name = {n: g for n, g in zip(leaves, found[1:], strict=True) if g is not None}
        return by_name, float(found[0]) if found[0] is not None else 0.0, float(loss.detach())

    def _by_share(self, by_name: Mapping[str, Tensor]) -> "Float[Tensor, 'groups models']":
        """Inner products of the mixture's gradient with each checkpoint, group by group."""
        sums = torch.zeros(self.groups, self.models, dtype=torch.float64)
        for column, candidate in enumerate(self.weights):
            with torch.no_grad(), tensors_of(candidate) as found:
                for name, tensor in found:
                    if name in by_name:
                        there = tensor.to(device=self._device, dtype=torch.float32)
                        product = torch.dot(by_name[name].flatten(), there.flatten())
                        sums[self._group[name], column] += product.double().cpu()
        return sums


class _Logits(nn.Module):
    """Images → logits, with everything that `functional_call` may replace below `model`."""

    def __init__(self, model: nn.Module, head: Tensor | None, tokens: Tensor | None, classes: int) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("head", head, persistent=False)
        self.register_buffer("tokens", tokens, persistent=False)
        self.classes = classes

    def forward(self, images: "Float[Tensor, 'batch 3 height width']") -> "Float[Tensor, 'batch classes']":
        model: Any = self.model
        features = model.encode_image(images, normalize=True)
        trained = getattr(model, "classification_head", None)
        if trained is not None:
            return F.linear(features, trained.weight, trained.bias)
        head = self.head
        if isinstance(self.tokens, Tensor):
            encoded = encode_text(self.model, self.tokens)
            head = F.normalize(encoded.view(self.classes, -1, encoded.shape[-1]).mean(dim=1), dim=-1)
        logits: Tensor = model.logit_scale.exp() * features @ head.T
        bias = getattr(model, "logit_bias", None)
        return logits if bias is None else logits + bias


def _head_of(
    evaluator: "Evaluator", split: str, weights: Sequence[Weights]
) -> tuple[Tensor | None, Tensor | None, int]:
    """(fixed head, prompts to build one from at each step, classes), for weights with no head of their own.

    One text tower for all checkpoints makes one head. Where towers differ, the head follows the mixture.
    """
    classes = evaluator.splits[split].classes
    module = evaluator.resident.module
    if hasattr(module, "classification_head"):
        return None, None, len(classes)
    templates = evaluator.templates(split)
    tokenizer = get_tokenizer(evaluator.model)
    if _one_text_tower(weights):
        return zero_shot_head(module, tokenizer, classes, templates), None, len(classes)
    texts = [text for row in prompts(classes, templates) for text in row]
    if len(texts) > MOST_PROMPTS:
        raise SelectionError(
            f"learning through differing text towers takes at most {MOST_PROMPTS} prompts, not {len(texts)}",
            hint="use fewer templates, as in --templates simple",
        )
    return None, tokenizer(texts).to(evaluator.resident.device), len(classes)


def _one_text_tower(weights: Sequence[Weights]) -> bool:
    with tensors_of(weights[0]) as found:
        first = {name: tensor for name, tensor in found if tower_of(name) == "text"}
        for other in weights[1:]:
            with tensors_of(other) as theirs:
                if not all(torch.equal(first[n], t) for n, t in theirs if n in first):
                    return False
    return True
