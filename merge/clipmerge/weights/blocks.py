"""The pass: blocks of every input in, one block out, by a few threads over buffers that are used again.

First touch of fresh memory is slower than arithmetic (about 1 GB/s), so each thread keeps a few buffers that
fit its cache and reads into them; nothing grows with the size or number of inputs.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from math import frexp
from threading import Lock, Thread
from typing import Any

import numpy as np

from clipmerge.checkpoint.read import Reader
from clipmerge.checkpoint.tensors import ITEMSIZE, Bytes, Extent, Tensor, storage_dtype
from clipmerge.ops.cast import F32, F64, Rounded, finite, narrow, scratch_for, widen
from clipmerge.weights.plan import Step
from clipmerge.weights.singles import SUMMED, Singles

BLOCK = 1 << 18
"""Elements that a thread takes at a time, reads with one call an input and writes with one.

Smaller blocks would stay in a core's own cache, but threads then wait for the interpreter more than they gain. Halves
that are summed in float32 come in blocks twice as long, for the same reason.
"""

Sink = Callable[[int, Bytes], None]
"""Takes (byte offset in the destination, bytes)."""


@dataclass(frozen=True, slots=True)
class Run:
    """A stretch of output elements that are computed alike, and where they go.

    Several steps whose tensors lie side by side in every input and in the output are one run.
    """

    steps: tuple[Step, ...]
    terms: tuple[tuple[float, Tensor], ...]
    numel: int
    sink: Sink
    offset: int

    @property
    def head(self) -> Step:
        return self.steps[0]


def join(steps: Iterable[tuple[Step, Sink, int]]) -> list[Run]:
    """Runs from (step, sink, byte offset), joining what lies side by side."""
    runs: list[Run] = []
    for step, sink, offset in steps:
        numel = int(np.prod(step.shape, dtype=np.int64))
        run = Run((step,), step.terms, numel, sink, offset)
        if runs and _adjacent(runs[-1], run):
            last = runs[-1]
            terms = tuple((f, _joined(a, b)) for (f, a), (_, b) in zip(last.terms, run.terms, strict=True))
            runs[-1] = Run((*last.steps, step), terms, last.numel + numel, sink, last.offset)
        else:
            runs.append(run)
    return runs


def _adjacent(left: Run, right: Run) -> bool:
    a, b = left.steps[-1], right.head
    if a.kind != "sum" or b.kind != "sum" or a.dtype != b.dtype or a.divisor != b.divisor:
        return False
    if left.sink is not right.sink or left.offset + left.numel * ITEMSIZE[a.dtype] != right.offset:
        return False
    if len(left.terms) != len(right.terms) or a.sources != b.sources:
        return False
    return all(f == g and _follows(x, y) for (f, x), (g, y) in zip(left.terms, right.terms, strict=True))


def _follows(x: Tensor, y: Tensor) -> bool:
    if x.dtype != y.dtype or x.strides or y.strides or len(x.extents) != 1 or len(y.extents) != 1:
        return False
    before, after = x.extents[0], y.extents[0]
    return before.source is after.source and before.offset + before.nbytes == after.offset


def _joined(x: Tensor, y: Tensor) -> Tensor:
    numel = x.numel + y.numel
    extent = x.extents[0]
    both = Extent(extent.source, extent.offset, extent.nbytes + y.extents[0].nbytes)
    return Tensor(x.dtype, (numel,), (both,))


class Buffers:
    """What one thread works in."""

    def __init__(self, torch: Any = None) -> None:
        numel = 2 * BLOCK  # memory that no block uses is never touched, and costs nothing
        self.total = np.empty(numel, np.float64)
        self.term = np.empty(numel, np.float64)
        self.scratch = scratch_for(numel, torch)
        self.singles = Singles(numel, self.scratch)
        self.raw = np.empty(BLOCK * 8, np.uint8)
        self.out = np.empty(BLOCK * 8, np.uint8)

    @property
    def nbytes(self) -> int:
        """What they take once every kind of block has been computed."""
        own = (self.total, self.term, self.raw, self.out)
        return sum(array.nbytes for array in own) + self.scratch.nbytes + self.singles.nbytes


NotFinite = Callable[[Run, int, int], None]
"""Told (run, first element, past the last) of a piece whose output is not finite."""


def run_blocks(
    runs: Sequence[Run],
    reader: Reader,
    *,
    threads: int,
    not_finite: NotFinite,
    on_done: Callable[[int], None] | None = None,
) -> None:
    """Compute every run of kind "sum".

    Args:
        not_finite: called in a worker thread; what it raises ends the pass.
        on_done: told the output bytes finished so far, from whichever thread finished them.
    """
    lock = Lock()
    done = 0

    def compute(run: Run, start: int, stop: int, buffers: Buffers) -> None:
        nonlocal done
        written = _block(run, start, stop, reader, buffers, not_finite)
        run.sink(run.offset + start * ITEMSIZE[run.head.dtype], written)
        if on_done:
            with lock:
                done += written.size
                on_done(done)

    in_threads((partial(compute, *block) for block in _blocks(runs)), threads)


def default_threads() -> int:
    """The cores that this process may use, at most four."""
    return min(4, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 2)


def in_threads(tasks: Iterable[Callable[[Buffers], None]], threads: int) -> None:
    """Run tasks in threads of our own, where subnormals are numbers whatever the program has set.

    Raises:
        Whatever a task raised first; no other is begun after it.
    """
    queue = iter(tasks)
    lock = Lock()
    failures: list[BaseException] = []

    def work(torch: Any) -> None:
        try:
            if torch:  # each thread converts its own blocks
                torch.set_num_threads(1)
                torch.set_flush_denormal(False)
            buffers = Buffers(torch)
            while True:
                with lock:
                    task = None if failures else next(queue, None)
                if task is None:
                    return
                with np.errstate(all="ignore"):  # what is not finite is found and reported, not warned about
                    task(buffers)
        except BaseException as error:  # handed to the caller, whatever it is
            with lock:
                failures.append(error)

    with _torch_if_imported() as torch:
        started: list[Thread] = []
        try:
            with suppress(RuntimeError):  # the system allows no more threads: fewer do the same work
                for _ in range(threads):
                    worker = Thread(target=work, args=[torch], daemon=True)
                    worker.start()
                    started.append(worker)
            if not started:  # this thread is the caller's: its settings are left alone
                work(None)
            for worker in started:
                worker.join()
        finally:  # interrupted: the others stop after the task they are in
            with lock:
                queue = iter(())
            for worker in started:
                worker.join()
    if failures:
        raise failures[0]


@contextmanager
def _torch_if_imported() -> Iterator[Any]:
    """torch, where the program has it already: nothing here imports it. Its thread count is as before afterwards."""
    torch = sys.modules.get("torch")
    if torch is None or getattr(torch.__spec__, "_initializing", False):
        yield None
        return
    threads = torch.get_num_threads()
    try:
        yield torch
    finally:
        torch.set_num_threads(threads)


def _blocks(runs: Sequence[Run]) -> Iterator[tuple[Run, int, int]]:
    for run in runs:
        length = 2 * BLOCK if _sums_halves(run) else BLOCK
        for start in range(0, run.numel, length):
            yield run, start, min(start + length, run.numel)


def _sums_halves(run: Run) -> bool:
    """Whether the whole sum may be had in float32."""
    dtype = run.head.dtype
    return bool(run.terms) and dtype in SUMMED and all(f == 1 and t.dtype == dtype for f, t in run.terms)


def _block(run: Run, start: int, stop: int, reader: Reader, buffers: Buffers, not_finite: NotFinite) -> Bytes:
    dtype = run.head.dtype
    size = ITEMSIZE[dtype]
    out = buffers.out[: (stop - start) * size]
    if _is_copy(run):
        reader.into(run.terms[0][1], start * size, out)
        if not finite(out.view(storage_dtype(dtype)), dtype):
            not_finite(run, start, stop)
        return out
    numbers, rounded = _combine(run, start, stop, reader, buffers)
    if not narrow(numbers, dtype, out.view(storage_dtype(dtype)), buffers.scratch, rounded):
        not_finite(run, start, stop)
    return out


def _is_copy(run: Run) -> bool:
    factor, tensor = run.terms[0] if len(run.terms) == 1 else (0.0, None)
    return tensor is not None and factor == run.head.divisor and tensor.dtype == run.head.dtype


def _combine(
    run: Run, low: int, high: int, reader: Reader, buffers: Buffers
) -> tuple[F32 | F64, Rounded | None]:
    """Σ factor·input / divisor for elements [low, high), in the thread's buffers, as `narrow` takes it."""
    total, term = buffers.total[: high - low], buffers.term[: high - low]
    divisor, done = run.head.divisor, 0
    buffers.singles.begin(high - low, run.head.dtype)
    if _sums_halves(run):
        while done < len(run.terms):
            if not buffers.singles.add(_raw(run.terms[done][1], low, high, reader, buffers), total, term):
                break
            done += 1
        if done == len(run.terms) and (mean := buffers.singles.over(divisor)):
            return mean
    buffers.singles.spill(total, term)
    if not run.terms:
        total[:] = 0.0
    for i, (factor, tensor) in enumerate(run.terms[done:], done):
        values = widen(_raw(tensor, low, high, reader, buffers), tensor.dtype, buffers.scratch)
        if i == 0:
            np.multiply(values, factor, out=total, dtype=np.float64) if factor != 1 else np.copyto(
                total, values
            )
        elif factor == 1:
            np.add(total, values, out=total)
        else:
            np.multiply(values, factor, out=term, dtype=np.float64)
            np.add(total, term, out=total)
    if frexp(divisor)[0] == 0.5:  # a power of two: its reciprocal is exact, and faster to apply
        np.multiply(total, 1 / divisor, out=total) if divisor != 1 else None
    else:
        np.divide(total, divisor, out=total)
    return total, None


def _raw(tensor: Tensor, low: int, high: int, reader: Reader, buffers: Buffers) -> np.ndarray[Any, Any]:
    """Elements [low, high) as stored, in the thread's buffer."""
    size = ITEMSIZE[tensor.dtype]
    raw = buffers.raw[: (high - low) * size]
    reader.into(tensor, low * size, raw)
    return raw.view(storage_dtype(tensor.dtype))
