"""AdamW, its schedule, and what follows a step: clipping, the moving average, a clamped logit scale."""

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

__all__ = ["MovingAverage", "adamw", "clip_gradients", "learning_rate"]

LOG_SCALE_LIMIT = math.log(100)
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
    decayed = [p for p in trained.values() if decay == "all" or p.ndim >= 2]
    spared = [p for p in trained.values() if decay != "all" and p.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": group, "weight_decay": rate}
        for parameters, rate in ((decayed, wd), (spared, 0.0))
        for group in by_kind(parameters)
    ]
    kinds = {p.device.type for p in trained.values()}
    return torch.optim.AdamW(groups, lr=lr, fused=kinds <= {"cpu", "cuda"} or None)


def set_learning_rate(optimiser: torch.optim.Optimizer, lr: float) -> None:
    """The same rate for every group."""
    for group in optimiser.param_groups:
        group["lr"] = lr


def clip_gradients(trained: Iterable["Tensor"], limit: float) -> None:
    """Scale gradients down to a total norm of `limit`, those of FSDP's shards and whole ones together."""
    groups = by_kind(p for p in trained if p.grad is not None)
    if len(groups) == 1 and not _is_shard(groups[0][0]):
        torch.nn.utils.clip_grad_norm_(groups[0], limit)
        return
    factor = min(1.0, limit / (math.hypot(*(_norm(group) for group in groups)) + 1e-6))
    for p in (p for group in groups for p in group):
        if p.grad is not None:
            p.grad.mul_(factor)


def by_kind(parameters: Iterable["Tensor"]) -> list[list["Tensor"]]:
    """FSDP's shards and whole tensors apart, in their order: kernels over lists take one kind at a time."""
    found = list(parameters)
    kinds = [[p for p in found if _is_shard(p) is kind] for kind in (True, False)]
    return [group for group in kinds if group]


def _is_shard(parameter: "Tensor") -> bool:
    return hasattr(parameter, "full_tensor")


def _norm(parameters: Sequence["Tensor"]) -> float:
    total: Any = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return float((total.full_tensor() if hasattr(total, "full_tensor") else total).item())


class MovingAverage:
    """An exponential moving average of the trained parameters, kept beside them."""

    def __init__(self, parameters: Iterable["Tensor"], decay: float) -> None:
        self.parameters: Sequence[Tensor] = [p for group in by_kind(parameters) for p in group]
        self.decay = decay
        self.values = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def update(self) -> None:
        """One step towards the parameters."""
        for values, now in zip(by_kind(self.values), by_kind(self.parameters), strict=True):
            torch._foreach_lerp_(values, [p.detach() for p in now], 1 - self.decay)

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
