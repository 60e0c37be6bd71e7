"""The learned soup: shares of the checkpoints found by gradient descent on held-out images.

Source: Wortsman et al. 2022, arXiv 2203.05482, section 3 and appendix I.
"""

from collections.abc import Sequence
from fractions import Fraction
from functools import reduce
from math import isfinite
from operator import add
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clipmerge.errors import NonFiniteError
from clipmerge.search.coefficients import Group, groups_of
from clipmerge.search.mixture import Mixture
from clipmerge.search.results import SoupResult
from clipmerge.search.soup import open_candidates
from clipmerge.types import Progress
from clipmerge.weights.coefficient import Coefficient
from clipmerge.weights.labels import names_of
from clipmerge.weights.weights import Source, Weights

if TYPE_CHECKING:
    from jaxtyping import Float

    from clipmerge.evaluate.evaluator import Evaluator

_DIGITS = 6


def learned_soup(
    checkpoints: Sequence[Source],
    evaluator: "Evaluator",
    *,
    split: str | None = None,
    per: Group = "model",
    lr: float = 0.05,
    epochs: int = 5,
    batch_size: int = 256,
    temperature: bool = True,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> SoupResult:
    """Learn a soup's shares by minimising the held-out cross-entropy; they start equal.

    Shares are a softmax over checkpoints. The gradient of a share is the inner product of the mixture's gradient with
    that checkpoint, so that one backward pass through one model is enough.

    Args:
        per: one share per model, or per model and tower, transformer block or tensor.
        temperature: learn a factor on the logits beside the shares; it is reported, and not part of the soup.

    Raises:
        SelectionError: no checkpoints, no such split or grouping, or more prompts than can be learned through.
    """
    weights = open_candidates(checkpoints)
    split = evaluator.split_name(split)
    groups = groups_of(weights[0].names, per)
    with evaluator.together(weights):
        evaluator.load(weights[0])
        mixture = Mixture(evaluator, split, weights, groups)
        # AdamW over a softmax of free numbers, beside the factor on the logits where that is learned.
        raw = torch.zeros(mixture.groups, mixture.models, requires_grad=True)
        beta = torch.ones((), requires_grad=temperature)
        optimizer = torch.optim.AdamW([raw, beta] if temperature else [raw], lr=lr, weight_decay=0.0)
        draw, done = torch.Generator().manual_seed(seed), 0
        steps = epochs * -(-mixture.size // batch_size)
        for _ in range(epochs):
            for indices in torch.split(torch.randperm(mixture.size, generator=draw), batch_size):
                shares = raw.softmax(dim=1)
                by_share, by_beta, loss = mixture.gradients(shares.detach(), beta.item(), indices)
                if not isfinite(loss):
                    hint = "a checkpoint may hold NaN or infinity"
                    raise NonFiniteError("the learned soup's loss is not finite", hint=hint)
                optimizer.zero_grad()
                torch.autograd.backward(shares, by_share)
                if temperature:
                    beta.grad = torch.tensor(by_beta)
                optimizer.step()
                done += 1
                if on_progress:
                    on_progress("learning", done, steps)
        numbers = round_shares(raw.detach().softmax(dim=1))
        soup = _soup(weights, groups, numbers)
        names = tuple(names_of(weights))
        by_group = {
            group: {name: float(share) for name, share in zip(names, row, strict=True)}
            for group, row in zip(groups, numbers, strict=True)
        }
        return SoupResult(
            "learned_soup",
            soup,
            names,
            names,
            score=evaluator.score(soup, split),
            split=split,
            coefficients=by_group if len(groups) > 1 else next(iter(by_group.values())),
            temperature=beta.item(),
        )


def round_shares(shares: "Float[Tensor, 'groups models']") -> list[list[Fraction]]:
    """Round each row to six decimals, with the remainder in its largest share: rows sum to exactly 1."""
    rows = []
    for row in shares.tolist():
        numbers = [Fraction(round(x * 10**_DIGITS), 10**_DIGITS) for x in row]
        numbers[numbers.index(max(numbers))] += 1 - sum(numbers)
        rows.append(numbers)
    return rows


def _soup(
    weights: Sequence[Weights], groups: Sequence[str], numbers: Sequence[Sequence[Fraction]]
) -> Weights:
    parts = []
    for column, candidate in enumerate(weights):
        rows = {group: row[column] for group, row in zip(groups, numbers, strict=True)}
        parts.append(candidate * Coefficient.of(rows if len(groups) > 1 else numbers[0][column]))
    total = reduce(add, parts)
    return Weights(total.terms, None if len(weights) > 1 else total.base)
