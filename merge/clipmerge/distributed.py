"""Processes that work together, as torchrun starts them; a process that is alone runs the same code.

Tensors travel by the device's own backend (NCCL on CUDA). Barriers and objects travel by gloo, which may wait for
hours: while one process decodes images or writes a file, NCCL's watchdog would kill the others after ten minutes.
"""

import atexit
import gc
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function

from clipmerge.errors import DeviceError

__all__ = [
    "AnyRank", "all_gather_object", "all_reduce_sum", "any_rank", "average_gradients", "barrier", "broadcast",
    "broadcast_object", "explain_lost_peer", "finish", "first_on_machine_first", "gather", "gather_object",
    "independent", "is_first", "local_rank", "local_world", "overlapping_share", "rank", "share", "start", "world",
]  # fmt: skip

T = TypeVar("T")

_PATIENCE = timedelta(hours=12)
_gloo: Any = None
"""The group of all processes over gloo: the default group itself where that is gloo already (None)."""
_joins = True


@contextmanager
def independent() -> Iterator[None]:
    """Within, `start` joins nobody: torchrun's processes are workers of their own, each on its own GPU."""
    global _joins
    before, _joins = _joins, False
    try:
        yield
    finally:
        _joins = before


def start(device: torch.device) -> None:
    """Join the other processes where torchrun started this one; otherwise do nothing."""
    global _gloo
    alone = int(os.environ.get("WORLD_SIZE", "1")) <= 1 or "RANK" not in os.environ
    if alone or not _joins or dist.is_initialized():
        return
    if device.type == "cuda":
        dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device, timeout=_PATIENCE)
        _gloo = dist.new_group(backend="gloo", timeout=_PATIENCE)
    else:
        dist.init_process_group("gloo", timeout=_PATIENCE)
    atexit.register(_leave_gloo)


def _leave_gloo() -> None:
    """Leave gloo's group after an error too.

    The traceback of an error that was printed holds what was trained, and that the group: taken down as late as the
    interpreter's last objects, while its threads run, it aborts the process, which then ends by -6.
    """
    if dist.is_initialized():
        with suppress(RuntimeError):
            dist.destroy_process_group(_gloo)
        for name in ("last_traceback", "last_value", "last_exc"):
            setattr(sys, name, None)
        gc.collect()


def finish() -> None:
    """Leave the other processes."""
    global _gloo
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    _gloo = None


@contextmanager
def explain_lost_peer() -> Iterator[None]:
    """Turn what torch raises when another process is gone into one sentence: that process has said what is wrong.

    Raises:
        DeviceError: another process stopped while this one waited for it.
    """
    try:
        yield
    except RuntimeError as error:
        lost = isinstance(error, dist.DistError) or "gloo" in str(error) or "closed by peer" in str(error)
        if world() == 1 or not lost:
            raise
        hint = "its own message says why; without one it was killed, perhaps for want of memory"
        raise DeviceError("another process of this run stopped", hint=hint) from error


def rank() -> int:
    """Return this process's number, 0 where it is alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world() -> int:
    """Return how many processes there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def local_rank() -> int | None:
    """Return this process's number on its machine; None where torchrun did not start several."""
    local = os.environ.get("LOCAL_RANK")
    return int(local) if local is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1 else None


def local_world() -> int:
    """Return how many processes torchrun started on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_first() -> bool:
    """Return whether this process is the one that writes files and speaks."""
    return rank() == 0


def share(n: int) -> slice:
    """Return this process's part of n rows; all parts are equal, so that n must be a multiple of `world()`."""
    size = n // world()
    return slice(rank() * size, (rank() + 1) * size)


def overlapping_share(n: int, of: int | None = None) -> tuple[slice, int]:
    """Return a process's part of n rows, and how many rows at its beginning the part before it has as well.

    All parts are equally long, because the processes of a sharded model must call it equally often; the last ones
    begin earlier instead of reaching beyond the end.

    Args:
        of: the process, this one where None.
    """
    size, number = -(-n // world()), rank() if of is None else of
    start = min(number * size, n - size)
    return slice(start, start + size), min(number * size, n) - start


def barrier() -> None:
    """Wait for the other processes, for hours if need be."""
    if world() > 1:
        dist.barrier(group=_gloo)


def first_on_machine_first(work: Callable[[], T]) -> T:
    """Call `work` in every process, on each machine in one process before the others: they find what it cached."""
    local = local_rank()
    leads = world() == 1 or (rank() if local is None else local) == 0
    result = work() if leads else None
    barrier()
    return work() if result is None else result


def all_reduce_sum(values: Tensor) -> Tensor:
    """Sum every process's tensor, in place; each process must come with the same shape."""
    if world() > 1:
        dist.all_reduce(values)
    return values


def broadcast(values: Tensor) -> Tensor:
    """Replace every process's tensor by the first one's, in place."""
    if world() > 1:
        dist.broadcast(values, src=0)
    return values


def broadcast_object(value: T) -> T:
    """Return the first process's value in every process: machines need not share a disk."""
    if world() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_gloo)
    return box[0]


def all_gather_object(value: T) -> list[T]:
    """Return one value of each process, in their order, in every process."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    dist.all_gather_object(values, value, group=_gloo)
    return values


def gather_object(value: T) -> list[T] | None:
    """Return one value of each process in the first one, None in the others. Tensors in it belong on the CPU."""
    if world() == 1:
        return [value]
    values: list[Any] | None = [None] * world() if is_first() else None
    dist.gather_object(value, values, dst=0, group=_gloo)
    return values


def any_rank(flag: bool) -> bool:
    """Return whether any process says so; every process gets the same answer."""
    if world() == 1:
        return flag
    raised = torch.tensor([int(flag)])
    dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=_gloo)
    return bool(raised.item())


class AnyRank:
    """Whether any process has said so, asked again and again by all of them: answered one call late.

    No host then waits for the slowest one at each step. A process that is alone gets its answer at once. It is used in
    a `with`: a process that ended while an answer is on its way, by an error, would be aborted by gloo's own thread.
    """

    def __init__(self) -> None:
        self._asked: tuple[Tensor, Any] | None = None

    def __enter__(self) -> "AnyRank":
        return self

    def __exit__(self, *_: object) -> None:
        if self._asked is not None:
            with suppress(RuntimeError):  # the others are gone, or too late: it matters no more
                self._asked[1].wait(timedelta(seconds=10))
            self._asked = None

    def __call__(self, flag: bool) -> bool:
        """Say so or not; return whether any process said so the time before."""
        if world() == 1:
            return flag
        raised = torch.tensor([int(flag)])
        before = self._asked
        self._asked = raised, dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=_gloo, async_op=True)
        if before is None:
            return False
        before[1].wait()
        return bool(before[0].item())


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace gradients by their mean over processes, in one message: for parameters that no wrapper holds."""
    if world() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    flat /= world()
    for gradient, averaged in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(averaged.view_as(gradient))


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.contiguous()
        rows = x.new_empty(world() * len(x), *x.shape[1:])
        all_gather = getattr(
            dist, "all_gather_single", dist.all_gather_into_tensor
        )  # its name since torch 2.14
        all_gather(rows, x)
        return rows

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Tensor:
        (gradient,) = gradients
        own: Tensor = gradient[share(len(gradient))]
        return own * world()


def gather(x: Tensor) -> Tensor:
    """Stack the rows of all processes, with gradient; every process gives the same number.

    Every process then computes the same loss over the same rows, so its own rows' gradient is already whole: no
    communication in the backward pass. Times the world, because gradients of parameters are averaged afterwards
    while this one is a sum over processes.
    """
    return x if world() == 1 else _Gather.apply(x)
