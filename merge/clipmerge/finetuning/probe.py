"""Linear probes: logistic regression by LBFGS, on the device that holds the features."""

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from clipmerge.errors import TrainingError
from clipmerge.types import Ints

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["linear_probe"]

STRENGTHS = (0.1, 1.0, 10.0, 100.0)
"""Inverse regularisation C tried where held-out features can choose it; features are unit vectors times SCALE."""

SCALE = 10.0
"""CLIP's probes see raw features, whose norm is about 10; unit features are brought to it, so C means the same."""

ROWS = 1 << 16
"""Images at a time: the logits of all would take more memory than their features."""


def linear_probe(
    features: "Float[Tensor, 'images d']",
    labels: Ints,
    classes: int,
    *,
    held_out: "tuple[Float[Tensor, 'held_out d'], Ints] | None" = None,
    strength: float = 0.316,
) -> "tuple[Float[Tensor, 'classes d'], Float[Tensor, ' classes']]":
    """Return weight and bias of a head over unit features, trained to convergence.

    Args:
        held_out: features and labels that choose the regularisation among STRENGTHS; without them `strength`
            is used (0.316: Radford et al. 2021, for ImageNet).

    Source: Kumar et al. 2022, arXiv 2202.10054.
    """
    present, rows = np.unique(labels, return_inverse=True)
    if len(present) < 2:
        raise TrainingError(
            "a linear probe needs images of two classes or more", hint="check the training data"
        )
    x, y = _scaled(features), torch.from_numpy(rows.reshape(-1)).to(features.device)
    fits = [_fit(x, y, len(present), c) for c in (STRENGTHS if held_out is not None else (strength,))]
    best = fits[0]
    if held_out is not None:
        seen, truth = _scaled(held_out[0]), held_out[1]
        right = [(present[(seen @ w.T + b).argmax(1).cpu().numpy()] == truth).sum() for w, b in fits]
        best = fits[int(np.argmax(right))]
    where = torch.from_numpy(present).to(features.device)
    weight = features.new_zeros(classes, features.shape[1]).index_copy_(0, where, (best[0] * SCALE).float())
    never = float(best[1].min()) - 100  # a class without images is never predicted
    bias = features.new_full((classes,), never).index_copy_(0, where, best[1].float())
    return weight, bias


def _scaled(features: Tensor) -> Tensor:
    """Return features as they are fitted: in float64 on a CPU; a GPU has little of it, and takes fp32."""
    return features.to(torch.float64 if features.device.type == "cpu" else torch.float32) * SCALE


def _fit(x: Tensor, y: Tensor, classes: int, strength: float) -> tuple[Tensor, Tensor]:
    """Minimise scikit-learn's objective: the mean cross-entropy plus |weight|² / (2 · C · images).

    With two classes scikit-learn has one row, the difference of ours, and so half of our penalty.
    """
    penalty = (2 if classes == 2 else 1) / (strength * len(x))
    weight, bias = x.new_zeros(classes, x.shape[1]), x.new_zeros(classes)
    solver = torch.optim.LBFGS(
        [weight, bias], max_iter=2000, tolerance_grad=1e-5, line_search_fn="strong_wolfe"
    )

    @torch.no_grad()
    def loss_and_gradient() -> Tensor:
        loss = 0.5 * penalty * weight.square().sum()
        weight.grad, bias.grad = penalty * weight, torch.zeros_like(bias)
        for piece, labels in zip(torch.split(x, ROWS), torch.split(y, ROWS), strict=True):
            logs = (piece @ weight.T + bias).log_softmax(dim=1)
            loss = loss - logs.gather(1, labels[:, None]).sum() / len(x)
            error = logs.exp_()
            error[torch.arange(len(error), device=x.device), labels] -= 1
            weight.grad += error.T @ piece / len(x)
            bias.grad += error.sum(dim=0) / len(x)
        return loss

    solver.step(loss_and_gradient)  # type: ignore[no-untyped-call]
    return weight, bias
