"""AdamW, its schedule, and what follows a step: clipping, the moving average, a clamped logit scale."""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

__all__ = ["MovingAverage", "adamw", "learning_rate"]

CLAMP = math.log(100)
"""open_clip and the CLIP paper keep exp(logit_scale) at 100 or below."""


def learning_rate(step: int, *, peak: float, warmup: int, steps: int) -> float:
    """Linear warmup, then half a cosine down to 0 at the end."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * done)) * peak


def adamw(trained: Mapping[str, "Tensor"], *, lr: float, wd: float, decay: str = "all") -> torch.optim.AdamW:
    """AdamW over the named parameters, in one fused kernel where the device has one.

    Args:
        decay: "all" decays every parameter, as the papers' code does; "matrices" leaves out norms, biases,
            gains and logit_scale (fewer than two dimensions), as open_clip does.
    """
    if decay == "all":
        groups: list[dict[str, Any]] = [{"params": list(trained.values()), "weight_decay": wd}]
    else:
        groups = [
            {"params": [p for p in trained.values() if p.ndim >= 2], "weight_decay": wd},
            {"params": [p for p in trained.values() if p.ndim < 2], "weight_decay": 0.0},
        ]
    groups = [group for group in groups if group["params"]]
    kinds = {p.device.type for p in trained.values()}
    return torch.optim.AdamW(groups, lr=lr, fused=kinds <= {"cpu", "cuda"} or None)


def set_learning_rate(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """The same rate for every group."""
    for group in optimiser.param_groups:
        group["lr"] = lr


class MovingAverage:
    """An exponential moving average of the trained parameters, kept beside them."""

    def __init__(self, parameters: Iterable["Tensor"], decay: float) -> None:
        self.parameters: Sequence[Tensor] = list(parameters)
        self.decay = decay
        self.values = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """One step towards the parameters."""
        torch._foreach_lerp_(self.values, [p.detach() for p in self.parameters], 1 - self.decay)

    @contextmanager
    def swapped_in(self) -> "Iterator[None]":
        """Within, the parameters hold the average."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, value in zip(self.parameters, self.values, strict=True):
            kept = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(kept)
