"""AdamW, its schedule, and what follows a step: clipping, the moving average, a clamped logit scale."""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "LOG_SCALE_LIMIT", "MovingAverage", "adamw", "clip_gradients", "learning_rate", "set_learning_rate",
]  # fmt: skip

LOG_SCALE_LIMIT = math.log(100)
"""open_clip and the CLIP paper keep exp(logit_scale) at 100 or below."""


def learning_rate(step: int, *, peak: float, warmup: int, steps: int) -> float:
    """Return the rate of a step: linear warmup, then half a cosine down to 0 at the end."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.5 * (1 + math.cos(math.pi * done)) * peak


def adamw(trained: Mapping[str, Tensor], *, lr: float, wd: float, decay: str = "all") -> torch.optim.AdamW:
    """Return AdamW over the named parameters, in one fused kernel where the device has one.

    Args:
        decay: "all" decays every parameter, as the papers' code does; "matrices" leaves out norms, biases,
            gains and logit_scale (fewer than two dimensions), as open_clip does.
    """
    decayed = [p for p in trained.values() if decay == "all" or p.ndim >= 2]
    spared = [p for p in trained.values() if decay != "all" and p.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": group, "weight_decay": rate}
        for parameters, rate in ((decayed, wd), (spared, 0.0))
        for group in _by_kind(parameters)
    ]
    devices = {p.device.type for p in trained.values()}
    return torch.optim.AdamW(groups, lr=lr, fused=devices <= {"cpu", "cuda"} or None)


def set_learning_rate(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the same rate."""
    for group in optimiser.param_groups:
        group["lr"] = lr


def clip_gradients(trained: Iterable[Tensor], limit: float) -> None:
    """Scale gradients down to a total norm of `limit`, those of FSDP's shards and whole ones together."""
    groups = _by_kind(p for p in trained if p.grad is not None)
    norms: list[Any] = [
        torch.nn.utils.get_total_norm([p.grad for p in g if p.grad is not None]) for g in groups
    ]
    if len(groups) == 1 and not hasattr(norms[0], "full_tensor"):
        torch.nn.utils.clip_grads_with_norm_(groups[0], limit, norms[0])
        return
    total = math.hypot(
        *(float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm) for norm in norms)
    )
    for parameter in (p for group in groups for p in group):
        if parameter.grad is not None:
            parameter.grad.mul_(min(1.0, limit / (total + 1e-6)))


def _by_kind(parameters: Iterable[Tensor]) -> list[list[Tensor]]:
    """Return FSDP's shards and whole tensors apart, in their order: kernels over lists take one kind at a time."""
    tensors = list(parameters)
    kinds = ([p for p in tensors if hasattr(p, "full_tensor") is sharded] for sharded in (True, False))
    return [group for group in kinds if group]


class MovingAverage:
    """Keep an exponential moving average of the trained parameters beside them."""

    def __init__(self, parameters: Iterable[Tensor], decay: float) -> None:
        self.parameters = [p for group in _by_kind(parameters) for p in group]
        self.decay = decay
        self.values = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """Move one step towards the parameters."""
        for values, now in zip(_by_kind(self.values), _by_kind(self.parameters), strict=True):
            torch._foreach_lerp_(values, [p.detach() for p in now], 1 - self.decay)

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Let the parameters hold the average for a while."""
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
