"""AdaMerging: a task vector's own scale for every task, learned on images without looking at their labels.

Source: Yang et al. 2024, arXiv 2310.02575.
"""

from collections.abc import Mapping
from fractions import Fraction
from math import isfinite
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from clipmerge.errors import NonFiniteError, SelectionError
from clipmerge.search.coefficients import Group, groups_of
from clipmerge.search.mixture import Mixture
from clipmerge.search.results import SoupResult
from clipmerge.types import Progress
from clipmerge.weights.coefficient import Coefficient
from clipmerge.weights.weights import Source, Weights, open_all

if TYPE_CHECKING:
    from clipmerge.evaluate.evaluator import Evaluator

_DIGITS = 6


def adamerging(
    base: Source,
    tuned: Mapping[str, Source],
    evaluator: "Evaluator",
    *,
    per: Group = "model",
    start: float = 0.3,
    lr: float = 1e-3,
    steps: int = 500,
    batch_size: int = 16,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> SoupResult:
    """Learn base + Σ scale·(finetuned - base) by making the answers on every task's images certain.

    Adam on the sum over tasks of the mean entropy of the predicted classes, in batches of every task; scales stay in
    [0, 1]. Labels are not looked at.

    Args:
        tuned: split → the model that was finetuned for it.
        per: one scale a task, or one a task and tower, transformer block or tensor (the paper's layer-wise form).
        start: every scale at the beginning. steps, batch_size: of each task.

    Returns:
        The model; `coefficients` holds the scales. `transductive` where a split is a test set: its images were then
        learned on.

    Raises:
        SelectionError: no task, or no such grouping. NonFiniteError: the loss is not finite.
    """
    if not tuned:
        raise SelectionError("adamerging needs finetuned models", hint="give each with images of its task")
    origin, *models = open_all([base, *tuned.values()])
    models = [model if model.kind() == 1 else origin + model for model in models]
    groups = groups_of(origin.names, per)
    with evaluator.together([origin, *models]):
        evaluator.load(origin)
        first, *others = tuned
        mixtures = [Mixture(evaluator, first, [origin, *models], groups)]
        mixtures += [Mixture(evaluator, name, [origin, *models], groups, like=mixtures[0]) for name in others]
        scales = torch.full((len(groups), len(models)), start, requires_grad=True)
        optimizer = torch.optim.Adam([scales], lr=lr)
        draw = torch.Generator().manual_seed(seed)
        for step in range(steps):
            by_scale, loss = torch.zeros_like(scales), 0.0
            shares = _shares(scales.detach())
            for mixture in mixtures:
                batch = torch.randint(mixture.size, (min(batch_size, mixture.size),), generator=draw)
                by_share, _, entropy = mixture.gradients(shares, 1.0, batch, labelled=False)
                by_scale += by_share[:, 1:] - by_share[:, :1]
                loss += entropy
            if not isfinite(loss):
                hint = "a checkpoint may hold NaN or infinity"
                raise NonFiniteError("the entropy of the answers is not finite", hint=hint)
            scales.grad = by_scale
            optimizer.step()
            with torch.no_grad():
                scales.clamp_(0, 1)
            if on_progress:
                on_progress("learning", step + 1, steps)
        numbers = [[Fraction(round(x * 10**_DIGITS), 10**_DIGITS) for x in row] for row in scales.tolist()]
        merged = origin
        for column, model in enumerate(models):
            rows = {group: row[column] for group, row in zip(groups, numbers, strict=True)}
            merged = merged + (model - origin) * Coefficient.of(
                rows if len(groups) > 1 else numbers[0][column]
            )
        by_group = {
            group: {name: float(number) for name, number in zip(tuned, row, strict=True)}
            for group, row in zip(groups, numbers, strict=True)
        }
        return SoupResult(
            "adamerging",
            Weights(merged.terms, origin.base),
            tuple(tuned),
            tuple(tuned),
            coefficients=by_group if len(groups) > 1 else next(iter(by_group.values())),
            transductive=any("test" in evaluator.splits[name].part for name in tuned),
        )


def _shares(scales: Tensor) -> Tensor:
    """Return each checkpoint's share of base + Σ scale·(finetuned - base), the base's first."""
    return torch.cat([1 - scales.sum(dim=1, keepdim=True), scales], dim=1)
