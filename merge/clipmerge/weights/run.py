"""Plan → bytes: the streaming pass, into files or into memory. Same bytes for any order and thread count."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from threading import Lock

import numpy as np
import numpy.typing as npt

from clipmerge.checkpoint.read import Reader
from clipmerge.checkpoint.tensors import Checkpoint
from clipmerge.dtypes import finite, narrow, scratch_for, storage_dtype, to_float64
from clipmerge.errors import MismatchError, NonFiniteError
from clipmerge.types import Bytes, Floats, Progress
from clipmerge.weights.blocks import Buffers, Sink, Stretch, block_length, default_threads, in_threads
from clipmerge.weights.digest import Digests
from clipmerge.weights.expression import Expression, Leaf
from clipmerge.weights.nonfinite import explain, refuse_inputs, refuse_overflow
from clipmerge.weights.plan import Plan, Step, integer_factors

Placed = tuple[Step, Sink, int]
"""A step, the sink that takes its bytes, and where in the sink they begin."""


def execute(
    plan: Plan,
    placed: list[Placed],
    reader: Reader,
    *,
    threads: int | None = None,
    allow_nonfinite: bool = False,
    digests: Digests | None = None,
    what: str = "merging",
    on_progress: Progress | None = None,
) -> None:
    """Compute every step into its sink.

    Args:
        threads: worker threads; None takes the cores this process may use, at most four.
        digests: of the inputs, taken as their tensors are read.
        what: the name of the work, for `on_progress`.

    Raises:
        MismatchError: integer tensors that should agree do not.
        NonFiniteError: see `Weights.save`.
        CheckpointError: an input ends early or changed while it was read.
    """
    if digests is not None and digests.complete:
        digests = None
    lock, done = Lock(), 0

    def not_finite(step: Step) -> None:
        if not allow_nonfinite:
            explain(step, reader)
            raise NonFiniteError(f"the output of {step.name!r} is not finite")

    def write(sink: Sink, offset: int, computed: Bytes) -> None:
        nonlocal done
        sink(offset, computed)
        if on_progress:
            with lock:
                done += computed.size
                on_progress(what, done, plan.written_bytes)

    def compute_whole(step: Step, sink: Sink, offset: int, _: Buffers) -> Iterator[None]:
        write(sink, offset, _WholeStep(step, reader, allow_nonfinite, digests).compute())
        yield

    def compute_stretch(stretch: Stretch, sink: Sink, offset: int, buffers: Buffers) -> Iterator[None]:
        for begin, computed in stretch.compute(buffers, not_finite):
            write(sink, offset + begin, computed)
            yield

    streamed = [item for item in placed if _streams(item[0])]
    whole = [item for item in placed if not _streams(item[0])]
    in_threads(
        (partial(compute_whole, *item) for item in whole), threads=1
    )  # one at a time: they may be large
    stretches = _stretches(streamed, reader, digests)
    in_threads((partial(compute_stretch, *item) for item in stretches), threads or default_threads())
    reader.unchanged()


def into_arrays(
    plan: Plan, destination: Callable[[str], Bytes], *, on_progress: Progress | None = None
) -> None:
    """Compute every step into memory.

    Args:
        destination: name → a writable, contiguous (nbytes,) view of where the tensor goes.
    """
    with Reader(plan.checkpoints) as reader:
        placed = [(step, _memory_sink(destination(name)), 0) for name, step in plan.steps.items()]
        execute(plan, placed, reader, on_progress=on_progress)


def _memory_sink(target: Bytes) -> Sink:
    def write(offset: int, data: Bytes) -> None:
        target[offset : offset + data.size] = data

    return write


def _streams(step: Step) -> bool:
    return step.kind == "sum" and not any(tensor.strides for _, tensor in step.terms)


def _stretches(
    placed: list[Placed], reader: Reader, digests: Digests | None
) -> Iterator[tuple[Stretch, Sink, int]]:
    for step, sink, offset in placed:
        wanted = digests is not None and any(digests.wants(source, step.name) for source in step.sources)
        length = step.numel if wanted else block_length(step)
        for low in range(0, step.numel, max(length, 1)):
            high = min(low + length, step.numel)
            yield Stretch(step, low, high, reader, digests if wanted else None), sink, offset


class _WholeStep:
    """One tensor that is not streamed: integers, transposed inputs, nonlinear methods.

    A checkpoint that stands in several operands of a method (the base of its task vectors) is read once and kept.
    """

    def __init__(self, step: Step, reader: Reader, allow_nonfinite: bool, digests: Digests | None) -> None:
        self.step = step
        self._reader = reader
        self._allow_nonfinite = allow_nonfinite
        self._digests = digests
        uses = Counter(c for _, leaf in step.leaves for c in _reads(leaf))
        self._shared: dict[Checkpoint, npt.NDArray[np.generic] | None] = {
            c: None for c in uses if uses[c] > 1
        }

    def compute(self) -> Bytes:
        if self.step.kind in ("agree", "largest"):
            return self._integers()
        terms = zip(self.step.terms, self.step.sources, strict=False)
        linear = ((factor, self._numbers(source)) for (factor, _), source in terms)
        nonlinear = ((factor, self._evaluate(leaf)) for factor, leaf in self.step.leaves)
        parts = nonlinear if self.step.kind == "computed" else linear
        flat = np.ascontiguousarray(_weighted(parts, self.step.shape) / self.step.divisor).reshape(-1)
        out = np.empty(flat.size, storage_dtype(self.step.dtype))
        if not narrow(flat, self.step.dtype, out, scratch_for(flat.size)) and not self._allow_nonfinite:
            explain(self.step, self._reader, flat)
            refuse_overflow(self.step, float("inf"))
        return out.view(np.uint8)

    def _stored(self, source: Checkpoint) -> npt.NDArray[np.generic]:
        kept = self._shared.get(source)
        if kept is not None:
            return kept
        name = self.step.name
        stored = self._reader.dense(source.tensors[name])
        if self._digests:
            self._digests.add_array(source, name, stored)
        if source in self._shared:
            self._shared[source] = stored
        return stored

    def _numbers(self, source: Checkpoint) -> Floats:
        dtype, stored = source.tensors[self.step.name].dtype, self._stored(source)
        # Looked at before a method sees it: one that trims or ranks may swallow what is not finite.
        if not self._allow_nonfinite and not finite(stored.reshape(-1), dtype):
            refuse_inputs(self.step, self._reader)
        return to_float64(stored, dtype)

    def _evaluate(self, leaf: Leaf) -> Floats:
        if isinstance(leaf, Checkpoint):
            return self._numbers(leaf)
        operands = [evaluate(operand, self.step.name, self._evaluate) for operand in leaf.operands]
        return leaf.method.function(*operands, **leaf.options)

    def _integers(self) -> Bytes:
        arrays = [self._stored(source) for source in self.step.sources]
        if self.step.kind == "largest":
            return np.asarray(np.maximum.reduce(arrays)).reshape(-1).view(np.uint8)
        first = self.step.sources[0]
        for source, other in zip(self.step.sources[1:], arrays[1:], strict=True):
            if not np.array_equal(arrays[0], other):
                raise MismatchError(
                    f"{self.step.name!r} holds integers that differ between "
                    f"{first.path or first.name} and {source.path or source.name}",
                    hint="integers are never averaged; the checkpoints must agree on them",
                )
        return arrays[0].reshape(-1).view(np.uint8)


def _reads(leaf: Leaf) -> list[Checkpoint]:
    """The checkpoints of a leaf, as often as its operands name them."""
    if isinstance(leaf, Checkpoint):
        return [leaf]
    return [c for operand in leaf.operands for inner in operand.terms for c in _reads(inner)]


def evaluate(weights: Expression, name: str, evaluate_leaf: Callable[[Leaf], Floats]) -> Floats:
    """Compute one tensor of an expression, in float64, from the same tensor of its leaves."""
    used = [(leaf, c.at(name)) for leaf, c in weights.terms.items() if c.at(name)]
    factors, divisor = integer_factors([c for _, c in used])
    parts = ((f, evaluate_leaf(leaf)) for f, (leaf, _) in zip(factors, used, strict=True))
    return np.asarray(_weighted(parts, weights.checkpoints[0].tensors[name].shape) / divisor)


def _weighted(parts: Iterable[tuple[float, Floats]], shape: tuple[int, ...]) -> Floats:
    """Σ factor·array in the order given, from the first one on: -0 stays -0."""
    total: Floats | None = None
    for factor, array in parts:
        total = factor * array if total is None else total + factor * array
    return np.zeros(shape, np.float64) if total is None else np.asarray(total)  # 0-d ones become numbers
