"""The learned soup: shares of the checkpoints found by gradient descent on held-out images.

Source: Wortsman et al. 2022, arXiv 2203.05482, section 3 and appendix I.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from clipmerge.errors import NonFiniteError, SelectionError
from clipmerge.search.coefficients import groups_of
from clipmerge.search.judge import Scorer
from clipmerge.search.mixture import Mixture
from clipmerge.search.soup import SoupResult, name_of, opened
from clipmerge.types import Progress
from clipmerge.weights.coefficient import Coefficient
from clipmerge.weights.names import matches
from clipmerge.weights.weights import Weights

if TYPE_CHECKING:
    from jaxtyping import Float

    from clipmerge.evaluate.evaluator import Evaluator

Per = Literal["model", "tower", "block", "tensor"]

_DIGITS = 6


def learned_soup(
    checkpoints: Sequence[Weights | str | os.PathLike[str]],
    evaluator: "Evaluator",
    *,
    split: str = "val",
    per: Per = "model",
    lr: float = 0.05,
    epochs: int = 5,
    batch_size: int = 256,
    temperature: bool = True,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> SoupResult:
    """A soup whose shares minimise the held-out cross-entropy; they start equal.

    Shares are a softmax over checkpoints. Only one mixture of the checkpoints and its gradient are in memory:
    the gradient of a share is the inner product of the mixture's gradient with that checkpoint.

    Args:
        per: one share a model, or a model and tower, transformer block or tensor.
        temperature: learn a factor on the logits beside the shares; it is reported, and not part of the soup.

    Raises:
        SelectionError: no checkpoints, no such split or grouping, or more prompts than can be learned through.
    """
    weights = opened(checkpoints)
    split = Scorer(evaluator).split(split)
    groups = groups_for(weights[0].names, per)
    evaluator.load(weights[0])
    mixture = Mixture(evaluator, split, weights, groups)
    shares, beta = _descend(mixture, lr, epochs, batch_size, temperature, seed, on_progress)
    numbers = rounded(shares)
    soup = _soup(weights, groups, numbers)
    names = tuple(map(name_of, weights))
    by_group = {
        group: {name: float(share) for name, share in zip(names, row, strict=True)}
        for group, row in zip(groups, numbers, strict=True)
    }
    return SoupResult(
        "learned",
        soup,
        names,
        names,
        score=evaluator.score(soup, split),
        split=split,
        coefficients=by_group if len(groups) > 1 else next(iter(by_group.values())),
        temperature=beta,
    )


def _descend(
    mixture: Mixture,
    lr: float,
    epochs: int,
    batch_size: int,
    temperature: bool,
    seed: int,
    on_progress: Progress | None,
) -> "tuple[Float[Tensor, 'groups models'], float]":
    """Shares and the temperature, after AdamW's last step."""
    raw = torch.zeros(mixture.groups, mixture.models, requires_grad=True)
    beta = torch.ones((), requires_grad=temperature)
    optimizer = torch.optim.AdamW([raw, beta] if temperature else [raw], lr=lr, weight_decay=0.0)
    draw = torch.Generator().manual_seed(seed)
    count = mixture.size
    steps = epochs * -(-count // batch_size)
    done = 0
    for _ in range(epochs):
        order = torch.randperm(count, generator=draw)
        for start in range(0, count, batch_size):
            shares = raw.softmax(dim=1)
            indices = order[start : start + batch_size]
            by_share, by_beta, loss = mixture.gradients(shares.detach(), beta.item(), indices)
            if not torch.isfinite(torch.tensor(loss)):
                raise NonFiniteError(
                    "the learned soup's loss is not finite", hint="a checkpoint may hold NaN or infinity"
                )
            optimizer.zero_grad()
            torch.autograd.backward(shares, by_share)
            if temperature:
                beta.grad = torch.tensor(by_beta)
            optimizer.step()
            done += 1
            if on_progress:
                on_progress("learning", done, steps)
    return raw.detach().softmax(dim=1), beta.item()


def groups_for(names: Sequence[str], per: Per) -> Mapping[str, Callable[[str], bool]]:
    """Group → whether a tensor may belong to it; the first group that says yes has the tensor."""
    if per == "model":
        return {"all": lambda name: True}
    if per == "tensor":
        return {name: name.__eq__ for name in names}
    if per not in ("tower", "block"):
        raise SelectionError(f"there is no grouping {per!r}", hint="model, tower, block or tensor")
    return {pattern: _matcher(pattern) for pattern in groups_of(names, per)}


def _matcher(pattern: str) -> Callable[[str], bool]:
    return lambda name: matches(pattern, name)


def rounded(shares: "Float[Tensor, 'groups models']") -> list[list[Fraction]]:
    """Each row to six decimals, with the remainder in its largest share: rows sum to exactly 1."""
    rows = []
    for row in shares.tolist():
        numbers = [Fraction(round(x * 10**_DIGITS), 10**_DIGITS) for x in row]
        numbers[numbers.index(max(numbers))] += 1 - sum(numbers)
        rows.append(numbers)
    return rows


def _soup(
    weights: Sequence[Weights], groups: Mapping[str, Any], numbers: Sequence[Sequence[Fraction]]
) -> Weights:
    terms: dict[Any, Coefficient] = {}
    for column, candidate in enumerate(weights):
        shares: Any = numbers[0][column]
        if len(groups) > 1:
            shares = {group: float(row[column]) for group, row in zip(groups, numbers, strict=True)}
        for leaf, coefficient in (candidate * Coefficient.of(shares)).terms.items():
            terms[leaf] = terms[leaf] + coefficient if leaf in terms else coefficient
    return Weights(terms, None if len(weights) > 1 else weights[0].base)
