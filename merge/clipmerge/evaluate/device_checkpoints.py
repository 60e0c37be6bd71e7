"""Checkpoints on a GPU: read once, kept while they fit, and sums of them computed there to the CPU's bits."""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from math import frexp
from threading import Lock
from typing import Any
from weakref import WeakKeyDictionary, ref

import numpy as np
import torch
from torch import Tensor

from clipmerge.checkpoint.read import Reader
from clipmerge.checkpoint.tensors import Checkpoint
from clipmerge.checkpoint.tensors import Tensor as Stored
from clipmerge.device import fits
from clipmerge.dtypes import torch_dtype
from clipmerge.types import Bytes
from clipmerge.weights.plan import Plan, Step, make_plan
from clipmerge.weights.weights import Weights

__all__ = ["DeviceCheckpoints", "lone_checkpoint"]

_COMPUTES = ("cuda",)
"""Devices that checkpoints are copied to; elsewhere they are read from their mapped pages."""

_BUFFER = 64 << 20
"""Bytes of a pinned buffer: large enough for a copy at full speed, small enough to be filled from cache."""

_ALIGNED = 16

_SUMMED = {"F64", "F32", "F16", "BF16"}


def lone_checkpoint(weights: Weights) -> Checkpoint | None:
    """Return the checkpoint that the weights are; None where they are computed from others."""
    only = next(iter(weights.terms)) if len(weights.terms) == 1 else None
    return only if isinstance(only, Checkpoint) and weights.terms[only].constant == 1 else None


@dataclass(frozen=True)
class _Copy:
    """A checkpoint's tensors on the device, as stored: views of one piece of memory, `ready` once they are there."""

    tensors: Mapping[str, Tensor]
    memory: Tensor
    ready: "torch.cuda.Event | None"


class DeviceCheckpoints:
    """Copies of checkpoints on a device, each in its own dtypes.

    Files go through two pinned buffers: while one is copied by the GPU, the other is filled.

    Args:
        keep: whether copies stay, while there is room, for as long as their checkpoints live.
    """

    def __init__(self, device: torch.device, *, keep: bool = True) -> None:
        self._device, self._keep = device, keep
        self._kept: WeakKeyDictionary[Checkpoint, _Copy] = WeakKeyDictionary()
        self._ahead: WeakKeyDictionary[Checkpoint, Future[_Copy]] = WeakKeyDictionary()
        self._next: WeakKeyDictionary[Checkpoint, ref[Checkpoint]] = WeakKeyDictionary()
        self._buffers: list[tuple[Tensor, torch.cuda.Event | None]] = []
        self._lock = Lock()
        self._stream: torch.cuda.Stream | None = None
        self._reader: ThreadPoolExecutor | None = None

    @property
    def computes(self) -> bool:
        """Whether checkpoints are copied to this device at all."""
        return self._device.type in _COMPUTES

    def expect(self, order: Sequence[Weights]) -> None:
        """Say what will be asked for: a checkpoint is read while the one before is in use."""
        if self.computes and self._keep:
            checkpoints = [c for weights in order if (c := lone_checkpoint(weights)) is not None]
            self._next.clear()
            for this, following in pairwise(checkpoints):
                self._next[this] = ref(following)

    def tensors(self, weights: Weights) -> Iterator[tuple[str, Tensor]] | None:
        """Return (name, tensor on the device) of each tensor: of one checkpoint as stored, of a sum the exact values.

        None: they are not computed here (on a CPU; methods, unusual dtypes, or too little memory).
        """
        if not self.computes or weights.kind() != 1:
            return None
        lone = lone_checkpoint(weights)
        if lone is not None:
            return iter(self._copy_of(lone).tensors.items())
        plan = make_plan(weights)
        if not self._keep or not all(map(_is_sum, plan.steps.values())):
            return None
        missing = [c for c in plan.checkpoints if c not in self._kept and c not in self._ahead]
        if not self._has_room(*missing):
            return None
        return self._sums(plan)

    # -- copies -------------------------------------------------------------------------------------------

    def _copy_of(self, checkpoint: Checkpoint) -> _Copy:
        copy = self._kept.get(checkpoint)
        if copy is None:
            ahead, stays = self._ahead.pop(checkpoint, None), self._has_room(checkpoint)
            copy = self._read(checkpoint) if ahead is None else ahead.result()
            if self._keep and (stays or ahead is not None):
                self._kept[checkpoint] = copy
        if checkpoint in self._next:
            self._read_ahead(self._next[checkpoint]())
        if copy.ready is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(copy.ready)
            copy.memory.record_stream(stream)  # its memory is not given away before what follows has read it
        return copy

    def _read_ahead(self, checkpoint: Checkpoint | None) -> None:
        if checkpoint is None or checkpoint in self._kept or checkpoint in self._ahead:
            return
        if self._has_room(checkpoint):
            self._reader = self._reader or ThreadPoolExecutor(1)
            self._ahead[checkpoint] = self._reader.submit(self._read, checkpoint)

    def _has_room(self, *checkpoints: Checkpoint) -> bool:
        nbytes = sum(tensor.nbytes for checkpoint in checkpoints for tensor in checkpoint.tensors.values())
        return not self._on_gpu or fits(nbytes, self._device)

    @property
    def _on_gpu(self) -> bool:
        return self._device.type == "cuda"

    def _read(self, checkpoint: Checkpoint) -> _Copy:
        places, end = {}, 0
        for name, tensor in checkpoint.tensors.items():
            places[name] = end
            end += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
        with self._lock, Reader([checkpoint]) as reader, self._on_own_stream():
            memory = torch.empty(end, dtype=torch.uint8, device=self._device)
            start = filled = 0  # the window that the buffer stands for: memory[start : start + _BUFFER]
            for name, tensor in checkpoint.tensors.items():
                dense, done = _dense(tensor, reader), 0
                while done < tensor.nbytes:
                    if (at := places[name] + done - start) >= _BUFFER:
                        self._flush(memory[start : start + filled])
                        start, filled, at = start + _BUFFER, 0, at - _BUFFER
                    count = min(tensor.nbytes - done, _BUFFER - at)
                    out: Bytes = self._buffer().numpy()[at : at + count]
                    if dense is None:
                        reader.into(tensor, done, out)
                    else:
                        out[:] = dense[done : done + count]
                    done, filled = done + count, at + count
            self._flush(memory[start : start + filled])
            reader.unchanged()
            ready = None
            if self._on_gpu:
                ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
                ready.record()
        tensors = {
            name: memory[places[name] : places[name] + t.nbytes].view(torch_dtype(t.dtype)).view(t.shape)
            for name, t in checkpoint.tensors.items()
        }
        return _Copy(tensors, memory, ready)

    def _on_own_stream(self) -> AbstractContextManager[Any]:
        if not self._on_gpu:
            return nullcontext()
        self._stream = self._stream or torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        return torch.cuda.stream(self._stream)

    def _buffer(self) -> Tensor:
        """Return the buffer that is filled now, once the last copy out of it has ended."""
        if not self._buffers:
            pinned = [torch.empty(_BUFFER, dtype=torch.uint8, pin_memory=self._on_gpu) for _ in range(2)]
            self._buffers = [(buffer, None) for buffer in pinned]
        buffer, copied = self._buffers[0]
        if copied is not None:
            copied.synchronize()
        return buffer

    def _flush(self, target: Tensor) -> None:
        """Start to copy the buffer's beginning to the device, and take the other buffer."""
        if not len(target):
            return
        buffer, copied = self._buffers[0]
        target.copy_(buffer[: len(target)], non_blocking=True)
        if self._on_gpu:
            copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            copied.record()
        self._buffers = [self._buffers[1], (buffer, copied)]

    # -- sums ---------------------------------------------------------------------------------------------

    def _sums(self, plan: Plan) -> Iterator[tuple[str, Tensor]] | None:
        """Compute every step as the CPU's pass does (weights/blocks.py): the same operations in the same order."""
        copies = {c: self._copy_of(c).tensors for c in plan.checkpoints}
        computed, finite = {}, []
        for name, step in plan.steps.items():
            stored = [(factor, copies[c][name]) for factor, c in step.terms if isinstance(c, Checkpoint)]
            if step.kind == "agree" and any(not torch.equal(stored[0][1], other) for _, other in stored[1:]):
                return None  # the CPU's pass says what differs
            computed[name] = (
                _whole(step, [t for _, t in stored]) if step.kind != "sum" else _sum(step, stored)
            )
            if step.kind == "sum":
                finite.append(computed[name].isfinite().all())
        return iter(computed.items()) if bool(torch.stack(finite).all()) else None


def _is_sum(step: Step) -> bool:
    if step.kind != "sum":
        return True
    known = {step.dtype, *(tensor.dtype for _, tensor in step.inputs)} <= _SUMMED
    return bool(step.inputs) and known and not step.has_methods


def _dense(tensor: Stored, reader: Reader) -> Bytes | None:
    """Return the bytes of a tensor that is not stored row by row, in that order; None for all others."""
    return None if tensor.strides is None else reader.dense(tensor).reshape(-1).view(np.uint8)


def _whole(step: Step, tensors: Sequence[Tensor]) -> Tensor:
    """Return integers that agree, or the largest of step counters."""
    largest = tensors[0]
    for other in tensors[1:] if step.kind == "largest" else ():
        largest = torch.maximum(largest, other)
    return largest


def _sum(step: Step, inputs: Sequence[tuple[float, Tensor]]) -> Tensor:
    """Compute Σ factor · input / divisor in float64, rounded once."""
    total = torch.empty(0)
    for i, (factor, tensor) in enumerate(inputs):
        # A product and a sum apart: as one operation a GPU would round them once, a CPU rounds twice.
        values = tensor.to(torch.float64, copy=True)
        values = values if factor == 1 else values.mul_(factor)
        total = total.add_(values) if i else values
    if frexp(step.divisor)[0] != 0.5:
        # By a number, CUDA would multiply by its rounded inverse.
        total.div_(torch.full((), step.divisor, dtype=torch.float64, device=total.device))
    elif step.divisor != 1:
        total.mul_(1 / step.divisor)
    return _round(total, torch_dtype(step.dtype))


def _round(total: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float64 once; torch goes to the two halves through float32, which would round twice."""
    if dtype in (torch.float64, torch.float32):
        return total.to(dtype)
    # Rounded to odd in between: what float32 cannot hold is cut off, and its last bit set to say so.
    single = total.to(torch.float32)
    back, bits = single.to(torch.float64), single.view(torch.int32)
    bits.sub_((back.abs() > total.abs()).to(torch.int32)).bitwise_or_((back != total).to(torch.int32))
    return single.to(dtype)
