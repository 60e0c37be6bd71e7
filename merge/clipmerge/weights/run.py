"""Plan → bytes: the streaming pass, into files or into memory. Same bytes for any order and thread count."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt

from clipmerge.checkpoint.read import Reader
from clipmerge.checkpoint.tensors import Checkpoint
from clipmerge.dtypes import TABLE, Scratch, finite, narrow, storage_dtype, to_float64
from clipmerge.errors import MismatchError, NonFiniteError
from clipmerge.types import Bytes, Progress
from clipmerge.weights.applied import Facts, weighted
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
from clipmerge.weights.expression import Applied, Leaf, applied_in
from clipmerge.weights.measure import measure
from clipmerge.weights.plan import Plan, Step
from clipmerge.weights.reading import ReadWhole, uses_in

if TYPE_CHECKING:
    import torch

SMALL = 1 << 23
"""Elements of a tensor of which several are computed at once where they are needed whole; of larger ones, one."""


def execute(
    plan: Plan,
    sinks: Iterable[tuple[str, Sink, int]],
    reader: Reader,
    *,
    threads: int | None = None,
    allow_nonfinite: bool = False,
    digests: Digests | None = None,
    device: "str | torch.device | None" = None,
    what: str = "merging",
    on_progress: Progress | None = None,
) -> None:
    """Compute every step into its sink.

    Args:
        sinks: of each step its name, the sink that takes its bytes, and where in the sink they begin.
        threads: worker threads; None takes the cores this process may use, at most four.
        digests: of the inputs, taken as their tensors are read.
        device: where methods decompose matrices, by CUDA or else on the CPU; None takes a GPU where there is one.
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
        write(sink, offset, _compute_whole(step, reader, allow_nonfinite, digests, facts))
        yield

    def one_at_a_time(items: Sequence[tuple[Step, Sink, int]], buffers: Buffers) -> Iterator[None]:
        for item in items:
            yield from whole(*item, buffers)

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
            stretch = Stretch(step, low, min(low + length, step.numel), reader, digests, facts)
            yield partial(streamed, stretch, sink, offset)

    placed = [(plan.steps[name], sink, offset) for name, sink, offset in sinks]
    threads = threads or default_threads()
    gpu = decomposing_gpu((leaf for step in plan.steps.values() for _, leaf in step.terms), device)
    held = [item for item in placed if not item[0].streams]
    methods = applied_in(leaf for item in held for _, leaf in item[0].terms)
    with _one_blas_thread(list(methods)), _decomposing_on(gpu):
        facts = measure(plan, reader, threads=threads, gpu=gpu, on_progress=on_progress)
        large = [item for item in held if item[0].numel > SMALL]
        small = (partial(whole, *item) for item in held if item[0].numel <= SMALL)
        in_threads([partial(one_at_a_time, large), *small], threads)
    in_threads((task for item in placed if item[0].streams for task in stretches(*item)), threads)
    reader.unchanged()


def decomposing_gpu(leaves: Iterable[Leaf], device: "str | torch.device | None") -> "torch.device | None":
    """Return the GPU on which leaves' matrices are decomposed; None: on the CPU, or there is nothing to decompose."""
    if str(device) == "cpu" or not any(applied.decomposes for applied in applied_in(leaves)):
        return None
    from clipmerge.device import resolve_device

    place = resolve_device(device)
    return place if place.type == "cuda" else None  # MPS has no float64


@contextmanager
def _decomposing_on(gpu: "torch.device | None") -> Iterator[None]:
    """Load what decomposes on a GPU, and say what to do where it has too little memory for the matrices."""
    if gpu is None:
        yield
        return
    import torch

    from clipmerge.device import out_of_memory_hint

    with out_of_memory_hint("decompose on the CPU: --device cpu"):
        # The first decomposition loads a library, which torch cannot do in several threads at once.
        torch.linalg.eigh(torch.eye(2, dtype=torch.float64, device=gpu))
        yield


def into_arrays(
    plan: Plan,
    destination: Callable[[str], Bytes],
    *,
    device: "str | torch.device | None" = None,
    on_progress: Progress | None = None,
) -> None:
    """Compute every step into memory.

    Args:
        destination: name → a writable, contiguous (nbytes,) view of where the tensor goes.
        device: as for `execute`.
    """

    def copy(target: Bytes, offset: int, data: Bytes) -> None:
        target[offset : offset + data.size] = data

    with Reader(plan.checkpoints) as reader:
        sinks = [(name, partial(copy, destination(name)), 0) for name in plan.steps]
        execute(plan, sinks, reader, device=device, on_progress=on_progress)


def _compute_whole(
    step: Step, reader: Reader, allow_nonfinite: bool, digests: Digests, facts: Facts
) -> Bytes:
    """Compute one tensor that is not streamed."""

    def seen(source: Checkpoint, raw: npt.NDArray[Any]) -> None:
        digests.add_array(source, step.name, raw)
        # Looked at before a method sees it: one that trims or ranks may swallow what is not finite.
        if not allow_nonfinite and not finite(raw.reshape(-1), source.tensors[step.name].dtype):
            _refuse_inputs(step, reader)

    if step.kind != "sum":
        arrays = [reader.dense(source.tensors[step.name]) for source in step.checkpoints]
        for source, array in zip(step.checkpoints, arrays, strict=True):
            digests.add_array(source, step.name, array)
        return _integers(step, arrays).reshape(-1).view(np.uint8)
    read = ReadWhole(reader, step.name, uses_in(leaf for _, leaf in step.terms), seen)
    total = weighted(step.terms, step.divisor, step.name, step.shape, read, facts).reshape(-1)
    out = np.empty(total.size, storage_dtype(step.dtype))
    if not narrow(total, step.dtype, out, Scratch(total.size)) and not allow_nonfinite:
        _refuse(step, reader, total)
    return out.view(np.uint8)


@contextmanager
def _one_blas_thread(methods: Collection[Applied]) -> Iterator[None]:
    """Let the products of methods run on the thread that asks: on more their last bits depend on how many there are."""
    if not methods:
        yield
        return
    if any(applied.decomposes for applied in methods):
        import scipy.linalg  # noqa: F401 - brings a BLAS of its own, which is limited only once it is there
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1, user_api="blas"):
        yield


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
