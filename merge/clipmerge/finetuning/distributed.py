"""Several processes as one: torchrun's ranks, features gathered with their gradient, gradients averaged."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.autograd import Function

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["average_gradients", "gather", "rank", "world"]


def rank() -> int:
    """This process among the ranks; 0 where there is one."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: "Tensor") -> "Tensor":
        x = x.contiguous()
        whole = x.new_empty(world() * len(x), *x.shape[1:])
        dist.all_gather_into_tensor(whole, x)
        return whole

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> "Tensor":
        (gradient,) = gradients
        size = len(gradient) // world()
        mine: Tensor = gradient[rank() * size : (rank() + 1) * size]
        return mine * world()


def gather(x: "Tensor") -> "Tensor":
    """Rows of all ranks, one below the other, with gradient; every rank gives the same number.

    Every rank then computes the same loss over the same rows, so its own rows' gradient is already whole: no
    communication in the backward pass. Times the world, because gradients of parameters are averaged afterwards
    while this one is a sum over ranks.
    """
    return x if world() == 1 else _Gather.apply(x)


def average_gradients(parameters: Iterable["Tensor"]) -> None:
    """The mean over ranks, in place: for the few parameters that the wrapped towers do not hold."""
    if world() == 1:
        return
    for parameter in parameters:
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= world()


def agreed(flag: bool, device: "torch.device") -> bool:
    """Whether any rank says so; every rank gets the same answer."""
    if world() == 1:
        return flag
    said = torch.tensor([int(flag)], device=device)
    dist.all_reduce(said, op=dist.ReduceOp.MAX)
    return bool(said.item())


def everyones(value: Any) -> list[Any]:
    """One value of each rank, in their order."""
    if world() == 1:
        return [value]
    found: list[Any] = [None] * world()
    dist.all_gather_object(found, value)
    return found
