"""A mixture of checkpoints that knows the gradient of its loss with respect to each share."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from clipmerge import distributed
from clipmerge.data.prompts import prompts
from clipmerge.device import Precision, autocast, fits, float32_matmul, out_of_memory_hint
from clipmerge.dtypes import torch_dtype
from clipmerge.errors import SelectionError
from clipmerge.evaluate.device_checkpoints import DeviceCheckpoints
from clipmerge.evaluate.evaluator import Evaluator
from clipmerge.evaluate.heads import average_templates, class_logits, encode_text
from clipmerge.evaluate.predictor import Head, Predictor
from clipmerge.evaluate.resident import tensors_of
from clipmerge.model import get_tokenizer
from clipmerge.weights.names import matches, tower_of
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

    Args:
        groups: patterns of names; the first that matches a tensor decides which row of shares it takes.
        like: a mixture of the same checkpoints on another split, which this one shares its parameters with.

    Attributes:
        groups, models: how many rows and columns the shares have. size: images.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        split: str,
        weights: Sequence[Weights],
        groups: Sequence[str],
        like: "Mixture | None" = None,
    ) -> None:
        predictor = evaluator.predictor
        self.groups, self.models = len(groups), len(weights)
        self.size = len(evaluator.splits[split])
        self._device, self._precision = predictor.device, predictor.precision
        self._images = predictor.device_split(split)
        if like is None:
            known = predictor.resident.module.state_dict()
            self._candidates = Candidates(weights, groups, known, self._device)
            self._candidates.keep()
        else:
            self._candidates = like._candidates
        head, tokens = _head_of(predictor, split, self._candidates)
        classes = len(evaluator.splits[split].classes)
        self._logits = _Logits(predictor.resident.module, *head, tokens, classes, predictor.precision)

    def gradients(
        self,
        shares: "Float[Tensor, 'groups models']",
        beta: float,
        indices: "Int[Tensor, ' batch']",
        *,
        labelled: bool = True,
    ) -> "tuple[Float[Tensor, 'groups models'], float, float]":
        """Compute the loss's gradient by share and by temperature, and the loss, over a batch.

        Args:
            shares: rows sum to 1. indices: into the split's images.
            labelled: the loss is the cross-entropy with the labels, else the entropy of the answers; a batch's mean.
        """
        sums = torch.zeros(shares.numel() + 2, dtype=torch.float64, device=self._device)
        mine = indices[distributed.rank() :: distributed.world()].numpy()
        if len(mine):
            with out_of_memory_hint("use a smaller --batch-size"), float32_matmul(self._precision):
                self._candidates.mix(shares)
                by_name, by_beta, loss = self._backward(beta, mine, len(indices), labelled)
                sums[:-2] = self._candidates.products(by_name).flatten()
                sums[-2], sums[-1] = by_beta, loss
        sums = distributed.all_reduce_sum(sums).cpu()
        return sums[:-2].view_as(shares).float(), float(sums[-2]), float(sums[-1])

    def _backward(
        self, beta: float, mine: "np.ndarray[Any, np.dtype[np.int64]]", batch: int, labelled: bool
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        leaves = {name: nn.Parameter(tensor) for name, tensor in self._candidates.mixed.items()}
        factor = torch.tensor(beta, device=self._device, requires_grad=True)
        rows, images = next(self._images.batches(mine, [(0, len(mine))]))
        named: dict[str, Tensor] = {f"model.{name}": leaf for name, leaf in leaves.items()}
        with _GradientOfStatistics():
            logits = functional_call(self._logits, named, (self._images.normalise(images),))
        logits = self._images.covered(factor * logits)
        if labelled:
            loss = F.cross_entropy(logits, self._images.labels[rows], reduction="sum") / batch
        else:
            loss = torch.special.entr(logits.softmax(dim=-1)).sum() / batch
        by_beta, *by_leaf = torch.autograd.grad(loss, [factor, *leaves.values()], allow_unused=True)
        by_name = {n: g for n, g in zip(leaves, by_leaf, strict=True) if g is not None}
        return by_name, torch.zeros_like(loss) if by_beta is None else by_beta, loss.detach()


class _GradientOfStatistics(TorchFunctionMode):
    """Write BatchNorm's eval mode out: torch's kernel has no gradient by running means and variances."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return (_normalise_by if func is F.batch_norm else func)(*args, **(kwargs or {}))


def _normalise_by(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Compute what `F.batch_norm` does in eval mode, channel by channel."""
    factor = (variance + eps).rsqrt() * (1 if weight is None else weight)
    offset = (0 if bias is None else bias) - mean * factor
    shape = (-1, *[1] * (x.ndim - 2))
    return (x * factor.view(shape) + offset.view(shape)).to(x.dtype)


class Candidates:
    """The checkpoints of a mixture, and the mixture as one flat vector, group by group.

    They are read from their mapped files at each step, or stay on the device as one matrix (models, parameters).

    Attributes:
        mixed: the mixture's tensors by name: views of the vector, fp32 on the device.
    """

    def __init__(
        self,
        weights: Sequence[Weights],
        groups: Sequence[str],
        known: Collection[str],
        device: torch.device,
    ) -> None:
        self._weights, self._source = tuple(weights), DeviceCheckpoints(device, keep=False)
        with tensors_of(weights[0], device) as tensors:
            shapes = {n: t.shape for n, t in tensors if t.is_floating_point() and n in known}
        self._group = {n: next(i for i, group in enumerate(groups) if matches(group, n)) for n in shapes}
        names = sorted(shapes, key=lambda name: self._group[name])
        ends = dict(zip(names, accumulate(shapes[name].numel() for name in names), strict=True))
        self._spans = {name: (ends[name] - shapes[name].numel(), ends[name]) for name in names}
        self._flat = torch.empty(max(ends.values(), default=0), dtype=torch.float32, device=device)
        self.mixed = {name: self._flat[slice(*self._spans[name])].view(shapes[name]) for name in shapes}
        self._shape = (len(groups), len(weights))
        self._matrix: Tensor | None = None

    def keep(self, *, if_it_fits: bool = True) -> None:
        """Put all candidates on the device, in their own dtype where they share one."""
        if if_it_fits and self._flat.device.type != "cuda":
            return
        stored = {c.tensors[name].dtype for w in self._weights for c in w.checkpoints for name in self._spans}
        dtypes = set(map(torch_dtype, stored))
        dtype = dtypes.pop() if dtypes in ({torch.bfloat16}, {torch.float16}) else torch.float32
        shape = (self._shape[1], self._flat.numel())
        if if_it_fits and not fits(shape[0] * shape[1] * dtype.itemsize, self._flat.device):
            return
        matrix = torch.empty(shape, dtype=dtype, device=self._flat.device)
        for row, name, tensor in self._tensors(self._spans):
            matrix[row, slice(*self._spans[name])] = tensor.reshape(-1)
        self._matrix = matrix

    @torch.no_grad()
    def mix(self, shares: "Float[Tensor, 'groups models']") -> None:
        """Fill the mixture with the sum of checkpoints times their shares."""
        rows = shares.to(self._flat)
        self._flat.zero_()
        for group, models, start, stop, values in self._pieces(self._spans):
            self._flat[start:stop].addmv_(values.T, rows[group, models])

    @torch.no_grad()
    def products(self, by_name: Mapping[str, Tensor]) -> "Float[Tensor, 'groups models']":
        """Multiply the mixture's gradient with each checkpoint, group by group; fp64 on the device."""
        gradient = torch.zeros_like(self._flat)
        for name, values in by_name.items():
            gradient[slice(*self._spans[name])] = values.reshape(-1)
        sums = torch.zeros(self._shape, dtype=torch.float64, device=gradient.device)
        for group, models, start, stop, values in self._pieces(by_name):
            sums[group, models] += torch.mv(values, gradient[start:stop]).double()
        return sums

    def share_text_tower(self) -> bool:
        """Return whether the candidates differ in their image towers alone."""
        names = [name for name in self._spans if tower_of(name) == "text"]
        if self._matrix is not None:
            spans = [self._matrix[:, slice(*self._spans[name])] for name in names]
            return all(bool((span[1:] == span[:1]).all()) for span in spans)
        first: dict[str, Tensor] = {}
        return all(
            first.setdefault(name, tensor) is tensor or torch.equal(first[name], tensor)
            for _, name, tensor in self._tensors(names)
        )

    def _pieces(self, names: Collection[str]) -> Iterator[tuple[int, slice, int, int, Tensor]]:
        """Yield (group, models, start, stop, their parameters there, fp32): small enough to be widened at once."""
        if self._matrix is None:
            for row, name, tensor in self._tensors(names):
                values = tensor.reshape(1, -1).to(self._flat)
                yield self._group[name], slice(row, row + 1), *self._spans[name], values
            return
        for group in range(self._shape[0]):
            spans = [self._spans[name] for name, owner in self._group.items() if owner == group]
            end = max((stop for _, stop in spans), default=0)
            for start in range(min((start for start, _ in spans), default=0), end, _COLUMNS):
                stop = min(start + _COLUMNS, end)
                yield group, slice(None), start, stop, self._matrix[:, start:stop].float()

    def _tensors(self, names: Collection[str]) -> Iterator[tuple[int, str, Tensor]]:
        for row, candidate in enumerate(self._weights):
            there = self._source.tensors(candidate)
            with nullcontext(there) if there else tensors_of(candidate, self._flat.device) as tensors:
                yield from ((row, name, tensor) for name, tensor in tensors if name in names)


class _Logits(nn.Module):
    """Images → logits, with everything that `functional_call` may replace below `model`."""

    def __init__(
        self,
        model: nn.Module,
        head: Tensor | nn.Module | None,
        rows: Tensor | None,
        tokens: Tensor | None,
        classes: int,
        precision: Precision,
    ) -> None:
        super().__init__()
        self.model = model
        self._head = (head, rows)  # a tuple, so that it is no part of the module
        self.register_buffer("tokens", tokens, persistent=False)
        self.classes, self.precision = classes, precision

    def forward(self, images: "Float[Tensor, 'batch 3 height width']") -> "Float[Tensor, 'batch classes']":
        model: Any = self.model
        with autocast(self.precision, images.device):
            features = model.encode_image(images, normalize=False)
        head, rows = self._head
        if isinstance(self.tokens, Tensor):
            head = average_templates(encode_text(model, self.tokens), self.classes)
        return class_logits(model, F.normalize(features.float(), dim=-1), head, rows)


def _head_of(predictor: Predictor, split: str, candidates: Candidates) -> tuple[Head, Tensor | None]:
    """Return a fixed head, or prompts to build one from at each step; neither for weights with a trained head.

    One text tower for all checkpoints makes one head. Where towers differ, the head follows the mixture.
    """
    setup = predictor.setup(split)
    if setup.head != "zero-shot" or candidates.share_text_tower():
        return predictor.head(split), None
    texts = [text for row in prompts(setup.classes, setup.templates) for text in row]
    if len(texts) > MOST_PROMPTS:
        raise SelectionError(
            f"learning through differing text towers takes at most {MOST_PROMPTS} prompts, not {len(texts)}",
            hint="use fewer templates, as in --templates simple",
        )
    return (None, None), get_tokenizer(predictor.spec())(texts).to(predictor.device)
