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
from clipmerge.checkpoint.tensors import Extent, Tensor
from clipmerge.dtypes import ITEMSIZE, Singles, finite, narrow, scratch_for, storage_dtype, widen
from clipmerge.types import Bytes, Floats
from clipmerge.weights.digest import Digests, StreamDigest
from clipmerge.weights.fp16_sum import Fp16Sum
from clipmerge.weights.steps import Step

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
        run = Run((step,), step.terms, step.numel, sink, offset)
        if runs and _adjacent(runs[-1], run):
            last = runs[-1]
            terms = tuple((f, _joined(a, b)) for (f, a), (_, b) in zip(last.terms, run.terms, strict=True))
            runs[-1] = Run((*last.steps, step), terms, last.numel + step.numel, sink, last.offset)
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
        self.fp16_sum = Fp16Sum(numel, self.scratch)
        self.raw = np.empty(BLOCK * 8, np.uint8)
        self.out = np.empty(BLOCK * 8, np.uint8)

    @property
    def nbytes(self) -> int:
        """What they take once every kind of block has been computed."""
        arrays = (self.total, self.term, self.raw, self.out)
        return sum(array.nbytes for array in arrays) + self.scratch.nbytes + self.fp16_sum.nbytes


NotFinite = Callable[[Run, int, int], None]
"""Called with (run, first element, past the last) of a piece whose output is not finite."""


def run_blocks(
    runs: Sequence[Run],
    reader: Reader,
    *,
    threads: int,
    not_finite: NotFinite,
    digests: Digests | None = None,
    on_done: Callable[[int], None] | None = None,
) -> None:
    """Compute every run of kind "sum".

    Args:
        not_finite: called in a worker thread; what it raises ends the pass.
        digests: of the inputs, taken from the blocks as they are read.
        on_done: called with the output bytes finished so far, by whichever thread finished them.
    """
    lock = Lock()
    done = 0

    def compute(run: Run, start: int, stop: int, steps: Sequence[Step], buffers: Buffers) -> None:
        nonlocal done
        streams = _input_digests(run, steps, digests) if digests else [None] * len(run.terms)
        for low, high in iter_blocks(start, stop, _block_length(run)):
            block = _Block(run, low, high, reader, buffers, streams)
            computed = block.compute(not_finite)
            run.sink(run.offset + low * ITEMSIZE[run.head.dtype], computed)
            if on_done:
                with lock:
                    done += computed.size
                    on_done(done)

    stretches = (stretch for run in runs for stretch in _stretches(run, whole_tensors=digests is not None))
    in_threads((partial(compute, *stretch) for stretch in stretches), threads)


def _stretches(run: Run, *, whole_tensors: bool) -> Iterator[tuple[Run, int, int, Sequence[Step]]]:
    """Cut a run into what one thread takes at a time: (run, first element, past the last, whole tensors in it).

    A block, where nothing else counts. A tensor's bytes are hashed in their order, so for digests a thread takes whole
    tensors and goes through their blocks one after the other.
    """
    length = _block_length(run)
    if not whole_tensors:
        yield from ((run, low, high, ()) for low, high in iter_blocks(0, run.numel, length))
        return
    start = stop = 0
    steps: list[Step] = []
    for step in run.steps:
        steps.append(step)
        stop += step.numel
        if stop - start >= length or step is run.steps[-1]:
            yield run, start, stop, steps
            start, steps = stop, []


def iter_blocks(start: int, stop: int, length: int) -> Iterator[tuple[int, int]]:
    """Cut [start, stop) into half-open ranges of at most `length`."""
    for low in range(start, stop, length):
        yield low, min(low + length, stop)


def _input_digests(run: Run, steps: Sequence[Step], digests: Digests) -> list[StreamDigest | None]:
    """For each input of a stretch what takes its digests; None for inputs whose digests are known."""
    streams: list[StreamDigest | None] = []
    for source, (_, tensor) in zip(run.head.sources, run.terms, strict=True):
        sizes = {step.name: step.numel * ITEMSIZE[tensor.dtype] for step in steps}
        wanted = all(digests.wants(source, name) for name in sizes)
        streams.append(StreamDigest(digests, source, sizes) if wanted else None)
    return streams


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


def _block_length(run: Run) -> int:
    return 2 * BLOCK if _fits_float32(run) else BLOCK


def _fits_float32(run: Run) -> bool:
    """Whether the whole sum may be had in float32 (see `fp16_sum`)."""
    is_fp16 = run.head.dtype == "F16" and all(f == 1 and t.dtype == "F16" for f, t in run.terms)
    return is_fp16 and bool(run.terms)


@dataclass(frozen=True, slots=True)
class _Block:
    """Elements [low, high) of a run, computed in a thread's buffers."""

    run: Run
    low: int
    high: int
    reader: Reader
    buffers: Buffers
    streams: Sequence[StreamDigest | None]

    def compute(self, not_finite: NotFinite) -> Bytes:
        """The output's bytes."""
        dtype = self.run.head.dtype
        out = self.buffers.out[: (self.high - self.low) * ITEMSIZE[dtype]].view(storage_dtype(dtype))
        if self._is_copy():
            self._read(0, out.view(np.uint8))
            is_finite = finite(out, dtype)
        else:
            is_finite = narrow(self._sum(), dtype, out, self.buffers.scratch)
        if not is_finite:
            not_finite(self.run, self.low, self.high)
        return out.view(np.uint8)

    def _is_copy(self) -> bool:
        factor, tensor = self.run.terms[0] if len(self.run.terms) == 1 else (0.0, None)
        return tensor is not None and factor == self.run.head.divisor and tensor.dtype == self.run.head.dtype

    def _read(self, i: int, out: Bytes | None = None) -> np.ndarray[Any, Any]:
        """The stored elements of input `i`, in `out` or the thread's buffer; each is read once."""
        tensor = self.run.terms[i][1]
        size = ITEMSIZE[tensor.dtype]
        raw = self.buffers.raw[: (self.high - self.low) * size] if out is None else out
        self.reader.into(tensor, self.low * size, raw)
        if (stream := self.streams[i]) is not None:
            stream.update(raw)
        return raw.view(storage_dtype(tensor.dtype))

    def _sum(self) -> Singles | Floats:
        """Σ factor·input / divisor, in the thread's buffers, as `narrow` takes it."""
        count, divisor = self.high - self.low, self.run.head.divisor
        total, term, halves = self.buffers.total[:count], self.buffers.term[:count], self.buffers.fp16_sum
        in_float32 = _fits_float32(self.run)
        halves.begin(count)
        for i, (factor, tensor) in enumerate(self.run.terms):
            raw = self._read(i)
            if in_float32:
                if halves.add(raw, total, term):
                    continue
                halves.spill(total, term)
                in_float32 = False
            values = widen(raw, tensor.dtype, self.buffers.scratch)
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
            if (mean := halves.over(divisor)) is not None:
                return mean
            halves.spill(total, term)
        if not self.run.terms:
            total[:] = 0.0
        if frexp(divisor)[0] == 0.5:  # a power of two: its reciprocal is exact, and faster to apply
            np.multiply(total, 1 / divisor, out=total) if divisor != 1 else None
        else:
            np.divide(total, divisor, out=total)
        return total
