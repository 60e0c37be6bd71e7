"""Plan → bytes: the streaming pass, into a file or into memory. Same bytes for any order and thread count."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt

from clipmerge.checkpoint.output import check_target, new_files, write_at
from clipmerge.checkpoint.read import Reader
from clipmerge.checkpoint.tensors import Bytes, Checkpoint, storage_dtype
from clipmerge.errors import MismatchError, NonFiniteError
from clipmerge.ops.cast import narrow, scratch_for, to_float64
from clipmerge.types import Progress
from clipmerge.weights.blocks import Buffers, Run, Sink, default_threads, in_threads, join, run_blocks
from clipmerge.weights.nonfinite import explain, overflow, refuse_inputs
from clipmerge.weights.plan import Plan, Step, float_dtype, integer_factors, make_plan
from clipmerge.weights.shards import shard_paths, split_into_shards, superseded
from clipmerge.weights.weights import Weights

if TYPE_CHECKING:
    from clipmerge.weights.weights import Leaf

F64 = npt.NDArray[np.float64]


def save(
    weights: Weights,
    path: Path,
    *,
    force: bool = False,
    dtype: str | None = None,
    allow_nonfinite: bool = False,
    shard_size: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    digests: bool = True,
    fsync: bool = False,
    threads: int | None = None,
    on_progress: Progress | None = None,
) -> Path:
    """See `Weights.save`."""
    from clipmerge.weights.provenance import file_metadata

    dtype = float_dtype(dtype)
    plan, real, old = check_save(weights, path, force=force, dtype=dtype, shard_size=shard_size)
    record = file_metadata(weights, dtype=dtype, extra=metadata, digests=digests, on_progress=on_progress)
    shards = split_into_shards(plan.tensors, shard_size, record)
    targets = shard_paths(real, shards)
    with (
        Reader(plan.checkpoints) as reader,
        new_files(targets, force=force, fsync=fsync, superseded=old) as descriptors,
    ):
        placed: list[tuple[Step, Sink, int]] = []
        for shard, descriptor, (target, _size) in zip(shards, descriptors, targets, strict=True):
            write_at(descriptor, shard.head, 0, target)
            sink = _file_sink(descriptor, target)
            placed += [(plan.steps[name], sink, offset) for name, offset in shard.offsets.items()]
        execute(
            plan, placed, reader, threads=threads, allow_nonfinite=allow_nonfinite, on_progress=on_progress
        )
    return targets[-1][0]


def check_save(
    weights: Weights,
    path: Path,
    *,
    force: bool = False,
    dtype: str | None = None,
    shard_size: int | None = None,
) -> tuple[Plan, Path, list[Path]]:
    """Refuse what `save` would refuse before it reads a tensor.

    Returns:
        The plan; the file that `path` really is; what stands under its name in another shape and will be removed.
    """
    inputs = [file for checkpoint in weights.checkpoints for file in checkpoint.files()]
    real = check_target(path, force=force, inputs=inputs)
    plan = make_plan(weights, dtype=dtype)
    targets = [target for target, _size in shard_paths(real, split_into_shards(plan.tensors, shard_size, {}))]
    old = superseded(real, targets)
    for target in (*targets, *old):
        check_target(target, force=force, inputs=inputs)
    return plan, real, old


def execute(
    plan: Plan,
    placed: list[tuple[Step, Sink, int]],
    reader: Reader,
    *,
    threads: int | None = None,
    allow_nonfinite: bool = False,
    on_progress: Progress | None = None,
) -> None:
    """Compute every step into its sink.

    Args:
        placed: (step, sink, byte offset in the sink); neighbours are joined where they can be.
        threads: worker threads; None takes the cores this process may use, at most four.

    Raises:
        MismatchError: integer tensors that should agree do not.
        NonFiniteError: see `Weights.save`.
        CheckpointError: an input ends early or changed while it was read.
    """
    whole = [item for item in placed if not _streams(item[0])]
    runs = join(item for item in placed if _streams(item[0]))

    def compute(step: Step, sink: Sink, offset: int, _: Buffers) -> None:
        sink(offset, _whole(step, reader, allow_nonfinite))

    in_threads((partial(compute, *item) for item in whole), threads=1)  # each is held in memory whole

    def not_finite(run: Run, low: int, high: int) -> None:
        if not allow_nonfinite:
            _locate(run, low, high, reader)

    def report(done: int) -> None:
        if on_progress:
            on_progress("merging", done, plan.written_bytes)

    count = threads or default_threads()
    run_blocks(runs, reader, threads=count, not_finite=not_finite, on_done=report if on_progress else None)
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


def _streams(step: Step) -> bool:
    return step.kind == "sum" and not any(tensor.strides for _, tensor in step.terms)


def _file_sink(descriptor: int, path: Path) -> Sink:
    def write(offset: int, data: Bytes) -> None:
        write_at(descriptor, data.data, offset, path)

    return write


def _memory_sink(target: Bytes) -> Sink:
    def write(offset: int, data: Bytes) -> None:
        target[offset : offset + data.size] = data

    return write


def _whole(step: Step, reader: Reader, allow_nonfinite: bool) -> Bytes:
    """One tensor that is not streamed: integers, transposed inputs, nonlinear methods."""
    if step.kind in ("agree", "largest"):
        return _integers(step, reader)
    if step.kind == "computed":
        if not allow_nonfinite:  # a method that trims or ranks may swallow what is not finite
            refuse_inputs(step, reader)
        numbers = sum_of(step, reader)
    else:
        parts = ((f, to_float64(reader.dense(tensor), tensor.dtype)) for f, tensor in step.terms)
        numbers = _weighted(parts, step.shape) / step.divisor
    flat = np.ascontiguousarray(numbers, np.float64).reshape(-1)
    out = np.empty(flat.size, storage_dtype(step.dtype))
    if not narrow(flat, step.dtype, out, scratch_for(flat.size)) and not allow_nonfinite:
        explain(step, reader, flat)
        overflow(step, float("inf"))
    return out.view(np.uint8)


def sum_of(step: Step, reader: Reader) -> F64:
    """Σ coefficient · leaf for a step that holds nonlinear leaves, in float64."""
    return _weighted(((c, evaluate(leaf, step.name, reader)) for c, leaf in step.leaves), step.shape)


def _weighted(parts: Iterable[tuple[float, F64]], shape: tuple[int, ...]) -> F64:
    """Σ factor·array in the order given, from the first one on: -0 stays -0."""
    total: F64 | None = None
    for factor, array in parts:
        total = factor * array if total is None else total + factor * array
    return np.zeros(shape, np.float64) if total is None else np.asarray(total)  # 0-d ones become numbers


def evaluate(leaf: "Leaf", name: str, reader: Reader) -> F64:
    """One tensor of a leaf, in float64."""
    if isinstance(leaf, Checkpoint):
        tensor = leaf.tensors[name]
        return to_float64(reader.dense(tensor), tensor.dtype)
    return leaf.evaluate([evaluate_weights(operand, name, reader) for operand in leaf.operands])


def evaluate_weights(weights: Weights, name: str, reader: Reader) -> F64:
    """One tensor of an expression, in float64."""
    used = [(leaf, c.at(name)) for leaf, c in weights.terms.items() if c.at(name)]
    factors, divisor = integer_factors([c for _, c in used])
    parts = ((f, evaluate(leaf, name, reader)) for f, (leaf, _) in zip(factors, used, strict=True))
    return np.asarray(_weighted(parts, weights.checkpoints[0].tensors[name].shape) / divisor)


def _integers(step: Step, reader: Reader) -> Bytes:
    arrays = [reader.dense(tensor) for _, tensor in step.terms]
    if step.kind == "largest":
        return np.asarray(np.maximum.reduce(arrays)).reshape(-1).view(np.uint8)
    for source, other in zip(step.sources[1:], arrays[1:], strict=True):
        if not np.array_equal(arrays[0], other):
            raise MismatchError(
                f"{step.name!r} holds integers that differ between "
                f"{step.sources[0].path or step.sources[0].name} and {source.path or source.name}",
                hint="integers are never averaged; the checkpoints must agree on them",
            )
    return arrays[0].reshape(-1).view(np.uint8)


def _locate(run: Run, low: int, high: int, reader: Reader) -> NoReturn:
    """Say which tensor of which input is not finite, or which output overflows."""
    begin = 0
    for step in run.steps:
        end = begin + int(np.prod(step.shape, dtype=np.int64))
        if begin < high and low < end:
            with np.errstate(all="ignore"):
                explain(step, reader)
        begin = end
    raise NonFiniteError(f"the output of {run.head.name!r} is not finite")
