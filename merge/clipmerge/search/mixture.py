"""A mixture of checkpoints that knows the gradient of its loss with respect to each share."""

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from clipmerge import distributed
from clipmerge.data.prompts import prompts
from clipmerge.device import Precision, autocast, float32_matmul, out_of_memory_hint
from clipmerge.errors import SelectionError
from clipmerge.evaluate.device_split import fits
from clipmerge.evaluate.evaluator import Evaluator
from clipmerge.evaluate.heads import average_templates, class_logits, encode_text
from clipmerge.evaluate.predictor import Predictor
from clipmerge.evaluate.resident import Upload, tensors_of
from clipmerge.model import get_tokenizer
from clipmerge.weights.names import tower_of
from clipmerge.weights.weights import Weights

if TYPE_CHECKING:
    from jaxtyping import Float, Int

MOST_PROMPTS = 2048
"""Prompts that a step can be asked to send gradients through, where the text towers differ."""

_COLUMNS = 1 << 20
"""Parameters that are widened at a time; 72 rows of them are 300 MB in fp32."""


class Mixture:
    """Σ share · checkpoint in one set of parameters, recomputed at each step.

    Under torchrun each process takes its part of every batch, and gradients are added up.

    Attributes:
        groups, models: how many rows and columns the shares have. size: images.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        split: str,
        weights: Sequence[Weights],
        groups: Mapping[str, Callable[[str], bool]],
    ) -> None:
        predictor = evaluator.predictor
        self.groups, self.models = len(groups), len(weights)
        self.size = len(evaluator.splits[split])
        self._device, self._precision = predictor.device, predictor.precision
        self._images = predictor.device_split(split)
        head, tokens = _head_of(predictor, split, weights)
        classes = len(evaluator.splits[split].classes)
        self._logits = _Logits(predictor.resident.module, head, tokens, classes, predictor.precision)
        self._layout = Layout(predictor.resident.module, weights[0], groups, self._device)
        self._candidates: Candidates = Streamed(weights, self._layout)
        nbytes = len(weights) * self._layout.flat.numel() * _dtype_of(weights, self._layout).itemsize
        if fits(nbytes, self._device):
            self._candidates = Matrix(weights, self._layout)

    def gradients(
        self, shares: "Float[Tensor, 'groups models']", beta: float, indices: "Int[Tensor, ' batch']"
    ) -> "tuple[Float[Tensor, 'groups models'], float, float]":
        """Compute the loss's gradient by share and by temperature, and the loss, over a batch.

        Args:
            shares: rows sum to 1. indices: into the split's images.
        """
        sums = torch.zeros(shares.numel() + 2, dtype=torch.float64, device=self._device)
        mine = indices[distributed.rank() :: distributed.world()].numpy()
        if len(mine):
            with out_of_memory_hint("use a smaller --batch-size"), float32_matmul(self._precision):
                self._candidates.mix(shares)
                by_name, by_beta, loss = self._backward(beta, mine, len(indices))
                sums[:-2] = self._candidates.products(by_name).flatten()
                sums[-2], sums[-1] = by_beta, loss
        sums = distributed.all_reduce_sum(sums).cpu()
        return sums[:-2].view_as(shares).float(), float(sums[-2]), float(sums[-1])

    def _backward(
        self, beta: float, mine: "np.ndarray[Any, np.dtype[np.int64]]", batch: int
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        leaves = {name: nn.Parameter(tensor) for name, tensor in self._layout.mixed.items()}
        factor = torch.tensor(beta, device=self._device, requires_grad=True)
        rows, images = next(self._images.batches(mine, [(0, len(mine))]))
        named: dict[str, Tensor] = {f"model.{name}": leaf for name, leaf in leaves.items()}
        logits = functional_call(self._logits, named, (self._images.normalise(images),))
        labels = self._images.labels[rows]
        loss = F.cross_entropy(self._images.covered(factor * logits), labels, reduction="sum") / batch
        by_beta, *by_leaf = torch.autograd.grad(loss, [factor, *leaves.values()], allow_unused=True)
        by_name = {n: g for n, g in zip(leaves, by_leaf, strict=True) if g is not None}
        return by_name, torch.zeros_like(loss) if by_beta is None else by_beta, loss.detach()


class Layout:
    """Where each float tensor of the mixture lies in one flat vector, group by group.

    Attributes:
        flat: the mixture, fp32 on the device. mixed: its tensors by name, views of `flat`.
        group: name → number of its group. bounds: each group's beginning and end in `flat`.
    """

    def __init__(
        self,
        module: nn.Module,
        weights: Weights,
        groups: Mapping[str, Callable[[str], bool]],
        device: torch.device,
    ) -> None:
        known = module.state_dict()
        with tensors_of(weights) as tensors:
            shapes = {n: t.shape for n, t in tensors if t.is_floating_point() and n in known}
        self.group = {n: next(i for i, owns in enumerate(groups.values()) if owns(n)) for n in shapes}
        names = sorted(shapes, key=lambda name: self.group[name])
        ends = dict(zip(names, accumulate(shapes[name].numel() for name in names), strict=True))
        self.spans = {name: (ends[name] - shapes[name].numel(), ends[name]) for name in names}
        self.flat = torch.empty(max(ends.values(), default=0), dtype=torch.float32, device=device)
        self.mixed = {n: self.flat[slice(*self.spans[n])].view(shapes[n]) for n in shapes}
        sizes = [0] * len(groups)
        for name in names:
            sizes[self.group[name]] += shapes[name].numel()
        self.bounds = [(end - size, end) for size, end in zip(sizes, accumulate(sizes), strict=True)]


class Candidates(Protocol):
    """The checkpoints of a mixture."""

    def mix(self, shares: "Float[Tensor, 'groups models']") -> None:
        """Fill the layout's vector with the sum of checkpoints times their shares."""

    def products(self, by_name: Mapping[str, Tensor]) -> "Float[Tensor, 'groups models']":
        """Multiply the mixture's gradient with each checkpoint, group by group; fp64 on the device."""


class Streamed:
    """Checkpoints that are read from their mapped files at each step: one mixture is all that memory holds."""

    def __init__(self, weights: Sequence[Weights], layout: Layout) -> None:
        self._weights, self._layout = weights, layout

    def mix(self, shares: "Float[Tensor, 'groups models']") -> None:
        """See `Candidates.mix`."""
        layout = self._layout
        layout.flat.zero_()
        for column, candidate in enumerate(self._weights):
            with torch.no_grad(), tensors_of(candidate) as tensors:
                for name, tensor in tensors:
                    if name in layout.mixed:
                        value = tensor.to(device=layout.flat.device, dtype=torch.float32)
                        layout.mixed[name].add_(value, alpha=float(shares[layout.group[name], column]))

    def products(self, by_name: Mapping[str, Tensor]) -> "Float[Tensor, 'groups models']":
        """See `Candidates.products`."""
        layout, models = self._layout, len(self._weights)
        sums = torch.zeros(len(layout.bounds), models, dtype=torch.float64, device=layout.flat.device)
        for column, candidate in enumerate(self._weights):
            with torch.no_grad(), tensors_of(candidate) as tensors:
                for name, tensor in tensors:
                    if name in by_name:
                        value = tensor.to(device=layout.flat.device, dtype=torch.float32)
                        product = torch.dot(by_name[name].flatten(), value.flatten())
                        sums[layout.group[name], column] += product.double()
        return sums


class Matrix:
    """Checkpoints that stay on the device as one matrix (models, parameters), in their own dtype."""

    def __init__(self, weights: Sequence[Weights], layout: Layout) -> None:
        self._layout = layout
        shape = (len(weights), layout.flat.numel())
        self._matrix = torch.empty(shape, dtype=_dtype_of(weights, layout), device=layout.flat.device)
        upload = Upload(layout.flat.device)
        for row, candidate in zip(self._matrix, weights, strict=True):
            with tensors_of(candidate) as tensors:
                for name, tensor in tensors:
                    if name in layout.spans:
                        row[slice(*layout.spans[name])].copy_(upload(tensor).reshape(-1))

    def mix(self, shares: "Float[Tensor, 'groups models']") -> None:
        """See `Candidates.mix`."""
        rows = shares.to(self._layout.flat)
        for group, start, stop in self._blocks():
            self._layout.flat[start:stop] = rows[group] @ self._matrix[:, start:stop].float()

    def products(self, by_name: Mapping[str, Tensor]) -> "Float[Tensor, 'groups models']":
        """See `Candidates.products`."""
        layout, models = self._layout, len(self._matrix)
        gradient = torch.zeros_like(layout.flat)
        for name, values in by_name.items():
            gradient[slice(*layout.spans[name])] = values.reshape(-1)
        sums = torch.zeros(len(layout.bounds), models, dtype=torch.float64, device=gradient.device)
        for group, start, stop in self._blocks():
            sums[group] += (self._matrix[:, start:stop].float() @ gradient[start:stop]).double()
        return sums

    def _blocks(self) -> list[tuple[int, int, int]]:
        """List (group, start, stop) of columns that are few enough to be widened at once."""
        return [
            (group, start, min(start + _COLUMNS, end))
            for group, (first, end) in enumerate(self._layout.bounds)
            for start in range(first, end, _COLUMNS)
        ]


def _dtype_of(weights: Sequence[Weights], layout: Layout) -> torch.dtype:
    """Return the dtype that all checkpoints share, fp32 where they do not."""
    dtypes = set()
    for candidate in weights:
        with tensors_of(candidate) as tensors:
            dtypes |= {tensor.dtype for name, tensor in tensors if name in layout.spans}
    return dtypes.pop() if dtypes in ({torch.bfloat16}, {torch.float16}) else torch.float32


class _Logits(nn.Module):
    """Images → logits, with everything that `functional_call` may replace below `model`."""

    def __init__(
        self, model: nn.Module, head: Tensor | None, tokens: Tensor | None, classes: int, precision: Precision
    ) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("head", head, persistent=False)
        self.register_buffer("tokens", tokens, persistent=False)
        self.classes, self.precision = classes, precision

    def forward(self, images: "Float[Tensor, 'batch 3 height width']") -> "Float[Tensor, 'batch classes']":
        model: Any = self.model
        with autocast(self.precision, images.device):
            features = model.encode_image(images, normalize=False)
        head = self.head if isinstance(self.head, Tensor) else None
        if isinstance(self.tokens, Tensor):
            head = average_templates(encode_text(model, self.tokens), self.classes)
        return class_logits(model, F.normalize(features.float(), dim=-1), head)


def _head_of(
    predictor: Predictor, split: str, weights: Sequence[Weights]
) -> tuple[Tensor | None, Tensor | None]:
    """Return a fixed head, or prompts to build one from at each step; neither for weights with a trained head.

    One text tower for all checkpoints makes one head. Where towers differ, the head follows the mixture.
    """
    if hasattr(predictor.resident.module, "classification_head") or _one_text_tower(weights):
        return predictor.head(split), None
    texts = [
        text
        for row in prompts(predictor.splits[split].classes, predictor.templates_of(split))
        for text in row
    ]
    if len(texts) > MOST_PROMPTS:
        raise SelectionError(
            f"learning through differing text towers takes at most {MOST_PROMPTS} prompts, not {len(texts)}",
            hint="use fewer templates, as in --templates simple",
        )
    return None, get_tokenizer(predictor.spec())(texts).to(predictor.device)


def _one_text_tower(weights: Sequence[Weights]) -> bool:
    with tensors_of(weights[0]) as tensors:
        first = {name: tensor for name, tensor in tensors if tower_of(name) == "text"}
        for other in weights[1:]:
            with tensors_of(other) as others:
                if not all(torch.equal(first[name], tensor) for name, tensor in others if name in first):
                    return False
    return True
