"""Contrastive batches larger than memory: two passes over pieces, the exact loss over the whole batch.

The first pass keeps features only; the loss over all of them gives each feature its gradient; the second pass
repeats each piece with its graph and sends that gradient through it. Source: Gao et al. 2021, arXiv 2101.06983.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["backward"]

Encode = Callable[[], "Tensor"]
Generators = tuple["Tensor", list["Tensor"]]


def backward(
    pieces: Sequence[Sequence[Encode]],
    loss: Callable[[list["Tensor"]], "Tensor"],
    *,
    scale: Callable[["Tensor"], "Tensor"] = lambda x: x,
) -> "Tensor":
    """The loss; its gradients are added to the parameters.

    Args:
        pieces: one sequence of pieces for each tower; a piece's call gives its features.
        loss: takes one tensor of features for each tower, pieces joined.
        scale: what is done to the loss before its backward pass (a gradient scaler's multiplication).
    """
    states: list[list[Generators]] = []
    features: list[Tensor] = []
    sizes: list[list[int]] = []
    for tower in pieces:
        kept, states_of = [], []
        for encode in tower:
            states_of.append(_generators())
            with torch.no_grad():
                kept.append(encode())
        features.append(torch.cat(kept).requires_grad_())
        states.append(states_of)
        sizes.append([len(piece) for piece in kept])
    value = loss(features)
    scale(value).backward()  # type: ignore[no-untyped-call]
    after = _generators()
    turns = [
        turn
        for tower, states_of, feature, rows in zip(pieces, states, features, sizes, strict=True)
        for turn in zip(tower, states_of, torch.split(_gradient(feature), rows), strict=True)
    ]
    for encode, state, gradient in turns:
        _restore(state)
        torch.autograd.backward(encode(), gradient)
    _restore(after)
    return value.detach()


def _gradient(feature: "Tensor") -> "Tensor":
    assert feature.grad is not None
    return feature.grad


def _generators() -> Generators:
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _restore(state: Generators) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
