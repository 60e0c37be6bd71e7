"""The pass: blocks of every input in, one block out, by a few threads over buffers that are used again.

First touch of fresh memory is slower than arithmetic (about 1 GB/s), so each thread keeps a few buffers that
fit its cache and reads into them; nothing grows with the size or number of inputs.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from math import ceil, frexp
from threading import Lock, Thread
from typing import Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from clipmerge.checkpoint.read import Reader
from clipmerge.checkpoint.tensors import Checkpoint
from clipmerge.dtypes import ITEMSIZE, Scratch, Singles, finite, narrow, storage_dtype, widen
from clipmerge.types import Bytes, Floats
from clipmerge.weights.applied import Facts, weighted
from clipmerge.weights.digest import Digests
from clipmerge.weights.fp16_sum import HalfSum
from clipmerge.weights.plan import Step
from clipmerge.weights.reading import Pool, ReadStretch, uses_in

BLOCK = 1 << 18
"""Elements, about, that a thread takes at a time, reads with one call an input and writes with one.

Smaller blocks would stay in a core's own cache, but threads then wait for the interpreter more than they gain. Halves
that are summed in float32 come in blocks twice as long, for the same reason.
"""

Sink = Callable[[int, Bytes], None]
"""Takes (byte offset in the destination, bytes)."""
NotFinite = Callable[[Step, npt.NDArray[Any]], None]
"""Called with a step of which a block is not finite, and the block; what it raises ends the pass."""


MEMORY = 2 * BLOCK * 60
"""Bytes of one thread's buffers: 60 for an element, once every kind of block has been computed."""


class Buffers:
    """What one thread works in."""

    def __init__(self, torch: Any = None) -> None:
        numel = 2 * BLOCK  # memory that no block uses is never touched, and costs nothing
        self.total = np.empty(numel, np.float64)
        self.term = np.empty(numel, np.float64)
        self.scratch = Scratch(numel, torch)
        self.halves = HalfSum(numel, self.scratch)
        self.raw = np.empty(8 * numel, np.uint8)
        self.pool = Pool()  # what methods read
        self.out = np.empty(8 * numel, np.uint8)


Task = Callable[[Buffers], Iterator[None]]
"""Work for one thread, in its buffers; yields after each block, where it may be stopped."""


class Stretch:
    """A stretch of one output tensor that one thread computes, block by block.

    Args:
        low, high: its first element, and past the last.
        digests: of the inputs, taken from the blocks as they are read; those that want one have the whole tensor.
        facts: what methods know of the whole model.
    """

    def __init__(
        self, step: Step, low: int, high: int, reader: Reader, digests: Digests, facts: Facts
    ) -> None:
        self._step, self._low, self._high, self._reader, self._digests = step, low, high, reader, digests
        self._inputs, self._facts = step.inputs, facts
        self._sources, self._uses = step.checkpoints, uses_in(leaf for _, leaf in step.terms)
        self._hashers = [blake3() if digests.wants(c, step.name) else None for c in self._sources]

    def compute(self, buffers: Buffers, not_finite: NotFinite) -> Iterator[tuple[int, Bytes]]:
        """Compute the blocks in order: (byte offset in the tensor, bytes in the thread's buffer)."""
        step, dtype, length = self._step, self._step.dtype, block_length(self._step)
        is_copy = [(factor, tensor.dtype) for factor, tensor in self._inputs] == [(step.divisor, dtype)]
        for low in range(self._low, self._high, length):
            high = min(low + length, self._high)
            out = buffers.out[: (high - low) * ITEMSIZE[dtype]].view(storage_dtype(dtype))
            if step.has_methods:
                numbers: npt.NDArray[Any] = self._methods(low, high, buffers, not_finite)
                is_finite = narrow(numbers, dtype, out, buffers.scratch)
            elif is_copy:
                numbers = self._read(0, low, high, out.view(np.uint8))
                is_finite = finite(out, dtype)
            else:
                numbers = self._sum(low, high, buffers)
                is_finite = narrow(numbers, dtype, out, buffers.scratch)
            if not is_finite:
                not_finite(step, numbers)
            yield low * ITEMSIZE[dtype], out.view(np.uint8)
        for source, hasher in zip(self._sources, self._hashers, strict=True):
            if hasher is not None:
                self._digests.add(source, step.name, hasher.hexdigest())

    def _read(self, i: int, low: int, high: int, out: Bytes) -> npt.NDArray[Any]:
        """The stored elements [low, high) of input `i`, read into the beginning of `out`; each is read once."""
        tensor = self._inputs[i][1]
        size = ITEMSIZE[tensor.dtype]
        raw = out[: (high - low) * size]
        self._reader.into(tensor, low * size, raw)
        if (hasher := self._hashers[i]) is not None:
            hasher.update(raw.data)
        return raw.view(storage_dtype(tensor.dtype))

    def _methods(self, low: int, high: int, buffers: Buffers, not_finite: NotFinite) -> Floats:
        """Σ factor·leaf / divisor, where methods of single entries are among the leaves."""
        step, hashers = self._step, dict(zip(self._sources, self._hashers, strict=True))

        def seen(source: Checkpoint, raw: npt.NDArray[Any]) -> None:
            if (hasher := hashers[source]) is not None:
                hasher.update(raw.view(np.uint8).data)
            if not finite(raw, source.tensors[step.name].dtype):  # a method that trims may swallow it
                not_finite(step, raw)

        scratch, pool, total = buffers.scratch, buffers.pool, buffers.total[: high - low]
        read = ReadStretch(self._reader, step.name, low, high, self._uses, scratch, pool, seen)
        return weighted(step.terms, step.divisor, step.name, total.shape, read, self._facts, total)

    def _sum(self, low: int, high: int, buffers: Buffers) -> Singles | Floats:
        """Σ factor·input / divisor, as `narrow` takes it."""
        step, halves = self._step, buffers.halves
        total, term = buffers.total[: high - low], buffers.term[: high - low]
        in_float32 = sums_halves(step)
        halves.begin(high - low)
        for i, (factor, tensor) in enumerate(self._inputs):
            raw = self._read(i, low, high, buffers.raw)
            if in_float32:
                if halves.add(raw, total, term):
                    continue
                halves.spill(total, term)
                in_float32 = False
            values = widen(raw, tensor.dtype, buffers.scratch)
            if i == 0 and factor == 1:
                np.copyto(total, values)
            elif i == 0:
                np.multiply(values, factor, out=total, dtype=np.float64)
            elif factor == 1:
                np.add(total, values, out=total)
            else:
                np.multiply(values, factor, out=term, dtype=np.float64)
                np.add(total, term, out=total)
        if in_float32:
            if (mean := halves.over(step.divisor)) is not None:
                return mean
            halves.spill(total, term)
        if not self._inputs:
            total[:] = 0.0
        if frexp(step.divisor)[0] != 0.5:
            np.divide(total, step.divisor, out=total)
        elif step.divisor != 1:  # a power of two: its reciprocal is exact, and faster to apply
            np.multiply(total, 1 / step.divisor, out=total)
        return total


def sums_halves(step: Step) -> bool:
    """Return whether the whole sum may be had in float32 (see `fp16_sum`)."""
    return step.dtype == "F16" and {(f, t.dtype) for f, t in step.inputs} == {(1, "F16")}


def block_length(step: Step) -> int:
    """Return how many elements of a step are computed at a time: equal blocks, at most 2 * `BLOCK`."""
    if step.has_methods:
        return BLOCK
    count = ceil(step.numel / (2 * BLOCK)) if sums_halves(step) else round(step.numel / BLOCK)
    return ceil(step.numel / max(count, 1))


def default_threads() -> int:
    """Return the cores that this process may use, at most four."""
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)


def in_threads(tasks: Iterable[Task], threads: int) -> None:
    """Run tasks in threads of their own, in which subnormals are numbers whatever the program has set.

    Raises:
        Whatever a task raised first, or KeyboardInterrupt; the others stop at their next block.
    """
    queue, lock = iter(tasks), Lock()
    failures: list[BaseException] = []

    def next_task() -> Task | None:
        with lock:
            return None if failures else next(queue, None)

    def work(torch: Any) -> None:
        try:
            if torch:  # each thread converts its own blocks
                torch.set_num_threads(1)
                torch.set_flush_denormal(False)
            buffers = Buffers(torch)
            with np.errstate(all="ignore"):  # what is not finite is looked for and reported, not warned about
                while (task := next_task()) is not None:
                    for _ in task(buffers):
                        if failures:
                            return
        except BaseException as error:  # handed to the caller, whatever it is
            failures.append(error)

    # torch is lent where the program has it already: nothing here imports it, and one that another thread is importing
    # at this moment is not ready. Its thread count belongs to the program, and is as before afterwards.
    torch = sys.modules.get("torch")
    torch = None if torch is None or getattr(torch.__spec__, "_initializing", False) else torch
    torch_threads = torch.get_num_threads() if torch else 0
    workers: list[Thread] = []
    try:
        with suppress(RuntimeError):  # the system allows no more threads: fewer do the same work
            for _ in range(threads):
                worker = Thread(target=work, args=[torch], daemon=True)
                worker.start()
                workers.append(worker)
        if not workers:  # this thread is the caller's: its settings are left alone
            work(None)
        for worker in workers:
            worker.join()
    except BaseException as interruption:
        failures.append(interruption)
    for worker in workers:
        worker.join()
    if torch:
        torch.set_num_threads(torch_threads)
    if failures:
        raise failures[0]
