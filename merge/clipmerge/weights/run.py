"""Plan → bytes: the streaming pass, into files or into memory. Same bytes for any order and thread count."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from threading import Lock
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from clipmerge.checkpoint.read import Reader
from clipmerge.checkpoint.tensors import Checkpoint
from clipmerge.dtypes import TABLE, Scratch, finite, narrow, storage_dtype, to_float64
from clipmerge.errors import MismatchError, NonFiniteError
from clipmerge.types import Bytes, Floats, Progress
from clipmerge.weights.blocks import (
    BLOCK,
    Buffers,
    Sink,
    Stretch,
    Task,
    block_length,
    default_threads,
    in_threads,
)
from clipmerge.weights.digest import Digests
from clipmerge.weights.expression import Expression, Leaf, checkpoints_of
from clipmerge.weights.plan import Plan, Step, integer_factors


def execute(
    plan: Plan,
    sinks: Iterable[tuple[str, Sink, int]],
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
        sinks: of each step its name, the sink that takes its bytes, and where in the sink they begin.
        threads: worker threads; None takes the cores this process may use, at most four.
        digests: of the inputs, taken as their tensors are read.
        what: the name of the work, for `on_progress`.

    Raises:
        MismatchError: integer tensors that should agree do not.
        NonFiniteError: see `Weights.save`.
        CheckpointError: an input ends early or changed while it was read.
    """
    digests = digests or Digests(())
    lock, done = Lock(), 0

    def write(sink: Sink, offset: int, computed: Bytes) -> None:
        nonlocal done
        sink(offset, computed)
        if on_progress:
            with lock:
                done += computed.size
                on_progress(what, done, plan.written_bytes)

    def not_finite(step: Step, numbers: npt.NDArray[Any]) -> None:
        if not allow_nonfinite:
            _refuse(step, reader, numbers)

    def whole(step: Step, sink: Sink, offset: int, _: Buffers) -> Iterator[None]:
        write(sink, offset, _compute_whole(step, reader, allow_nonfinite, digests))
        yield

    def streamed(stretch: Stretch, sink: Sink, offset: int, buffers: Buffers) -> Iterator[None]:
        for begin, computed in stretch.compute(buffers, not_finite):
            write(sink, offset + begin, computed)
            yield

    def stretches(step: Step, sink: Sink, offset: int) -> Iterator[Task]:
        # A hash takes a tensor's bytes in their order. So where the digest of an input is wanted, one thread takes
        # the whole tensor, block by block; elsewhere any thread may take any block.
        hashed = any(digests.wants(source, step.name) for source in step.checkpoints)
        length = step.numel if hashed else block_length(step)
        for low in range(0, step.numel, max(length, 1)):
            stretch = Stretch(step, low, min(low + length, step.numel), reader, digests)
            yield partial(streamed, stretch, sink, offset)

    placed = [(plan.steps[name], sink, offset) for name, sink, offset in sinks]
    # Tensors that are needed whole may be large: one at a time.
    in_threads((partial(whole, *item) for item in placed if not _streams(item[0])), threads=1)
    in_threads(
        (task for item in placed if _streams(item[0]) for task in stretches(*item)),
        threads or default_threads(),
    )
    reader.unchanged()


def into_arrays(
    plan: Plan, destination: Callable[[str], Bytes], *, on_progress: Progress | None = None
) -> None:
    """Compute every step into memory.

    Args:
        destination: name → a writable, contiguous (nbytes,) view of where the tensor goes.
    """

    def copy(target: Bytes, offset: int, data: Bytes) -> None:
        target[offset : offset + data.size] = data

    with Reader(plan.checkpoints) as reader:
        sinks = [(name, partial(copy, destination(name)), 0) for name in plan.steps]
        execute(plan, sinks, reader, on_progress=on_progress)


def _streams(step: Step) -> bool:
    """Whether a step is computed in blocks, and not from whole tensors: integers, transposed ones, methods."""
    strided = any(c.tensors[step.name].strides is not None for c in step.checkpoints)
    return step.kind == "sum" and not step.has_methods and not strided


def _compute_whole(step: Step, reader: Reader, allow_nonfinite: bool, digests: Digests) -> Bytes:
    """Compute one tensor that is not streamed.

    A checkpoint that stands in several operands of a method (the base of its task vectors) is read once and kept.
    """
    uses = Counter(c for _, leaf in step.terms for c in checkpoints_of(leaf))
    shared: dict[Checkpoint, npt.NDArray[np.generic]] = {}

    def stored(source: Checkpoint) -> npt.NDArray[np.generic]:
        if source in shared:
            return shared[source]
        array = reader.dense(source.tensors[step.name])
        digests.add_array(source, step.name, array)
        if uses[source] > 1:
            shared[source] = array
        return array

    def numbers(source: Checkpoint) -> Floats:
        array, dtype = stored(source), source.tensors[step.name].dtype
        # Looked at before a method sees it: one that trims or ranks may swallow what is not finite.
        if not allow_nonfinite and not finite(array.reshape(-1), dtype):
            _refuse_inputs(step, reader)
        return to_float64(array, dtype)

    if step.kind != "sum":
        return _integers(step, [stored(source) for source in step.checkpoints]).reshape(-1).view(np.uint8)
    total = _weighted(step.terms, step.divisor, step.shape, step.name, numbers).reshape(-1)
    out = np.empty(total.size, storage_dtype(step.dtype))
    if not narrow(total, step.dtype, out, Scratch(total.size)) and not allow_nonfinite:
        _refuse(step, reader, total)
    return out.view(np.uint8)


def _integers(step: Step, arrays: list[npt.NDArray[np.generic]]) -> npt.NDArray[np.generic]:
    if step.kind == "largest":
        return np.asarray(np.maximum.reduce(arrays))
    first = step.checkpoints[0]
    for source, other in zip(step.checkpoints, arrays, strict=True):
        if not np.array_equal(arrays[0], other):
            raise MismatchError(
                f"{step.name!r} holds integers that differ between "
                f"{first.path or first.name} and {source.path or source.name}",
                hint="integers are never averaged; the checkpoints must agree on them",
            )
    return arrays[0]


def _refuse(step: Step, reader: Reader, numbers: npt.NDArray[Any]) -> NoReturn:
    """Refuse an output that is not finite, and say why.

    Args:
        numbers: the output, or a block of it, before it is narrowed.

    Raises:
        NonFiniteError: an input is not finite, or the output is more than its dtype holds.
    """
    _refuse_inputs(step, reader)
    worst = float(np.abs(numbers).max(initial=0.0))
    worst = float("inf") if np.isnan(worst) else worst  # a sum of finite numbers left float64
    raise NonFiniteError(
        f"tensor {step.name!r} reaches {worst:.6g}, more than {step.dtype} holds ({TABLE[step.dtype].largest:.6g})",
        hint="use smaller scales" if step.dtype in ("F64", "F32") else "write a wider dtype: --dtype fp32",
    )


def _refuse_inputs(step: Step, reader: Reader) -> None:
    """Look through every input of a step.

    Raises:
        NonFiniteError: one holds NaN or infinity; says which, how many, and where the first one stands.
    """
    for source in step.checkpoints:
        tensor, count, first = source.tensors[step.name], 0, 0
        for start, raw in reader.blocks(tensor, BLOCK):
            if not finite(raw, tensor.dtype):
                bad = np.flatnonzero(~np.isfinite(to_float64(raw, tensor.dtype)))
                first = first if count else start + int(bad[0])
                count += bad.size
        if count:
            raise NonFiniteError(
                f"{source.path or source.name}: tensor {step.name!r} holds {count} "
                f"{'value that is' if count == 1 else 'values that are'} not finite, "
                f"the first at {[int(i) for i in np.unravel_index(first, tensor.shape)]}",
                hint="that checkpoint is damaged or diverged; leave it out, or pass --allow-nonfinite",
            )


def evaluate(
    weights: Expression, name: str, shape: tuple[int, ...], read: Callable[[Checkpoint], Floats]
) -> Floats:
    """Compute one tensor of an expression, in float64, from the same tensor of its checkpoints."""
    used = [(leaf, c.at(name)) for leaf, c in weights.terms.items() if c.at(name)]
    factors, divisor = integer_factors([c for _, c in used])
    terms = zip(factors, (leaf for leaf, _ in used), strict=True)
    return _weighted(terms, divisor, shape, name, read)


def _weighted(
    terms: Iterable[tuple[float, Leaf]],
    divisor: float,
    shape: tuple[int, ...],
    name: str,
    read: Callable[[Checkpoint], Floats],
) -> Floats:
    """Σ factor·leaf / divisor, added in the order given, from the first one on: -0 stays -0."""
    total: Floats | None = None
    for factor, leaf in terms:
        if isinstance(leaf, Checkpoint):
            array = read(leaf)
        else:
            operands = [evaluate(operand, name, shape, read) for operand in leaf.operands]
            array = leaf.method.function(*operands, **leaf.options)
        total = factor * array if total is None else total + factor * array
    return np.zeros(shape) if total is None else np.ascontiguousarray(total / divisor).reshape(shape)
