"""Several processes that score together, as torchrun starts them; one alone runs the same code."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["add_up", "barrier", "finish", "is_writer", "local_device", "rank", "start", "world"]


def start(device: str = "cpu") -> None:
    """Join the other processes where torchrun started this one; otherwise do nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1 or "RANK" not in os.environ:
        return
    import torch
    import torch.distributed as dist

    if not dist.is_initialized():
        place = local_device(device)
        if place.startswith("cuda"):
            torch.cuda.set_device(place)
        dist.init_process_group("nccl" if place.startswith("cuda") else "gloo")


def finish() -> None:
    """Leave the other processes."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def local_device(device: str) -> str:
    """`cuda` as this process's own GPU (`cuda:LOCAL_RANK`); any other device as it is."""
    if device != "cuda" or "LOCAL_RANK" not in os.environ:
        return device
    return f"cuda:{os.environ['LOCAL_RANK']}"


def rank() -> int:
    """This process's number, 0 where it is alone."""
    import torch.distributed as dist

    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_writer() -> bool:
    """Whether this process writes files and speaks: the first one."""
    return rank() == 0


def barrier() -> None:
    """Wait for the other processes."""
    if world() > 1:
        import torch.distributed as dist

        dist.barrier()


def add_up(values: "torch.Tensor") -> "torch.Tensor":
    """The sum of every process's tensor, in place; each process must come with the same shape."""
    if world() > 1:
        import torch.distributed as dist

        dist.all_reduce(values)
    return values
