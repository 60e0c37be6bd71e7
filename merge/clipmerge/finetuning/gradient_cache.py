"""Contrastive batches larger than memory: the exact loss over the whole batch, with one piece in memory at a time.

First pass: every piece is encoded without a graph, and its features are kept. The loss over all features gives the
gradient of each feature. Second pass: every piece is encoded again, with its graph and with the random numbers of the
first pass (dropout must repeat), and its features' gradient is sent back through it.

Source: Gao et al. 2021, arXiv 2101.06983.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from clipmerge.finetuning.state import generators, restore_generators

__all__ = ["backward"]

Encode: TypeAlias = Callable[[], Tensor]


def backward(
    towers: Sequence[Sequence[Encode]],
    loss: Callable[[list[Tensor]], Tensor],
    device: torch.device,
    *,
    scale: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """Return the loss; its gradients are added to the parameters.

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
