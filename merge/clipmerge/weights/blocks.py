"""The pass: blocks of every input in, one block out, by a few threads over buffers that are used again.

First touch of fresh memory is slower than arithmetic (about 1 GB/s), so each thread keeps a few buffers that
fit its cache and reads into them; nothing grows with the size or number of inputs.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from math import frexp
from threading import Lock, Thread
from typing import Any

import numpy as np

from clipmerge.checkpoint.read import Reader
from clipmerge.checkpoint.tensors import ITEMSIZE, Bytes, Extent, Tensor, storage_dtype
from clipmerge.ops.cast import finite, float32_share, in_place, narrow, scale_of, spare_for, widen
from clipmerge.weights.plan import Step

BLOCK = 1 << 18
"""Elements that a thread takes at a time, reads with one call an input and writes with one.

Smaller blocks would stay in a core's own cache, but threads then wait for the interpreter more than they gain.
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

    def __init__(self) -> None:
        self.total = np.empty(BLOCK, np.float64)
        self.term = np.empty(BLOCK, np.float64)
        self.spare = spare_for(BLOCK)
        self.raw = np.empty(BLOCK * 8, np.uint8)
        self.out = np.empty(BLOCK * 8, np.uint8)


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
    blocks = _blocks(runs)
    lock = Lock()
    failures: list[BaseException] = []
    done = 0

    def work() -> None:
        nonlocal done
        buffers = Buffers()
        while True:
            with lock:
                block = None if failures else next(blocks, None)
            if block is None:
                return
            try:
                run, start, stop = block
                written = _block(run, start, stop, reader, buffers, not_finite)
                run.sink(run.offset + start * ITEMSIZE[run.head.dtype], written)
                if on_done:
                    with lock:
                        done += written.size
                        on_done(done)
            except BaseException as error:  # handed to the caller, whatever it is
                with lock:
                    failures.append(error)
                return

    def quietly() -> None:
        with np.errstate(all="ignore"):  # what is not finite is found and reported, not warned about
            work()

    workers: list[Thread] = []
    try:
        with suppress(RuntimeError):  # the system allows no more threads: fewer do the same work
            for _ in range(threads - 1):
                workers.append(Thread(target=quietly, daemon=True))
                workers[-1].start()
        quietly()
    finally:
        with lock:
            blocks = iter(())
        for worker in workers:
            if worker.ident is not None:  # it did start
                worker.join()
    if failures:
        raise failures[0]


def _blocks(runs: Sequence[Run]) -> Iterator[tuple[Run, int, int]]:
    for run in runs:
        for start in range(0, run.numel, BLOCK):
            yield run, start, min(start + BLOCK, run.numel)


def _block(run: Run, start: int, stop: int, reader: Reader, buffers: Buffers, not_finite: NotFinite) -> Bytes:
    dtype = run.head.dtype
    size = ITEMSIZE[dtype]
    out = buffers.out[: (stop - start) * size]
    if _is_copy(run):
        reader.into(run.terms[0][1], start * size, out)
        if not finite(out.view(storage_dtype(dtype)), dtype):
            not_finite(run, start, stop)
        return out
    total = _combine(run, start, stop, reader, buffers)
    if not narrow(total, dtype, out.view(storage_dtype(dtype)), buffers.spare):
        not_finite(run, start, stop)
    return out


def _is_copy(run: Run) -> bool:
    factor, tensor = run.terms[0] if len(run.terms) == 1 else (0.0, None)
    return tensor is not None and factor == run.head.divisor and tensor.dtype == run.head.dtype


def _combine(
    run: Run, low: int, high: int, reader: Reader, buffers: Buffers
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Σ factor·input / divisor for elements [low, high), in the thread's float64 buffer."""
    total = buffers.total[: high - low]
    done = _exact_in_float32(run, low, high, reader, buffers)
    if not run.terms:
        total[:] = 0.0
    for i, (factor, tensor) in enumerate(run.terms[done:], done):
        values = widen(_raw(tensor, low, high, reader, buffers), tensor.dtype, buffers.spare[0])
        if i == 0:
            np.multiply(values, factor, out=total, dtype=np.float64) if factor != 1 else np.copyto(
                total, values
            )
        elif factor == 1:
            np.add(total, values, out=total)
        else:
            term = buffers.term[: high - low]
            np.multiply(values, factor, out=term, dtype=np.float64)
            np.add(total, term, out=total)
    divisor = run.head.divisor
    if frexp(divisor)[0] == 0.5:  # a power of two: its reciprocal is exact, and faster to apply
        np.multiply(total, 1 / divisor, out=total) if divisor != 1 else None
    else:
        np.divide(total, divisor, out=total)
    return total


def _exact_in_float32(run: Run, low: int, high: int, reader: Reader, buffers: Buffers) -> int:
    """Sum leading terms of one narrow dtype in float32, twice as fast, while nothing is rounded; how many."""
    singles = buffers.spare[1][: high - low]
    dtype = run.terms[0][1].dtype if run.terms else ""
    room, done = 1.0, 0
    for factor, tensor in run.terms if dtype in ("F16", "F8_E4M3", "F8_E5M2") else ():
        if factor != 1 or tensor.dtype != dtype:
            break
        raw = _raw(tensor, low, high, reader, buffers)
        room -= float32_share(raw, dtype)
        if room < 0:
            break
        values = in_place(raw, dtype, buffers.spare[0][: high - low] if done else singles)
        if done:
            np.add(singles, values, out=singles)
        done += 1
    if done:
        np.multiply(singles, scale_of(dtype), out=buffers.total[: high - low], dtype=np.float64)
    return done


def _raw(tensor: Tensor, low: int, high: int, reader: Reader, buffers: Buffers) -> np.ndarray[Any, Any]:
    """Elements [low, high) as stored, in the thread's buffer."""
    size = ITEMSIZE[tensor.dtype]
    raw = buffers.raw[: (high - low) * size]
    reader.into(tensor, low * size, raw)
    return raw.view(storage_dtype(tensor.dtype))
