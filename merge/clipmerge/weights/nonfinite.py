"""Where a merge goes wrong: the input that is not finite, or the output that overflows. Read in pieces."""

from collections.abc import Iterator
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from clipmerge.checkpoint.read import Reader
from clipmerge.checkpoint.tensors import ITEMSIZE, Checkpoint, Tensor, iter_blocks, storage_dtype
from clipmerge.errors import NonFiniteError
from clipmerge.ops.cast import F64, LARGEST, finite, to_float64
from clipmerge.weights.plan import Step

PIECE = 1 << 20
"""Elements looked at together."""


def refuse_inputs(step: Step, reader: Reader) -> None:
    """Look through every input of a step.

    Raises:
        NonFiniteError: one holds NaN or infinity; says which, how many, and where the first one stands.
    """
    for source in step.sources:
        tensor = source.tensors[step.name]
        count, first = 0, 0
        for start, raw in _pieces(tensor, reader):
            if not finite(raw, tensor.dtype):
                bad = np.flatnonzero(~np.isfinite(to_float64(raw, tensor.dtype)))
                first = first if count else start + int(bad[0])
                count += bad.size
        if count:
            _refuse(source, step.name, count, [int(i) for i in np.unravel_index(first, tensor.shape)])


def explain(step: Step, reader: Reader, numbers: F64 | None = None) -> None:
    """Say why a step's output is not finite, if it is not.

    Args:
        numbers: the output before it is narrowed; computed again in pieces where it is not given.

    Raises:
        NonFiniteError: an input is not finite, or the output overflows.
    """
    refuse_inputs(step, reader)
    worst = _reach(numbers) if numbers is not None else _reach_of_sum(step, reader)
    if not worst <= LARGEST[step.dtype]:
        overflow(step, worst)


def overflow(step: Step, worst: float) -> NoReturn:
    """Refuse an output that its dtype cannot hold."""
    raise NonFiniteError(
        f"tensor {step.name!r} reaches {worst:.6g}, more than {step.dtype} holds ({LARGEST[step.dtype]:.6g})",
        hint="write a wider dtype: --dtype fp32"
        if step.dtype not in ("F64", "F32")
        else "use smaller scales",
    )


def _refuse(source: Checkpoint, name: str, count: int, first: list[int]) -> NoReturn:
    raise NonFiniteError(
        f"{source.path or source.name}: tensor {name!r} holds {count} "
        f"{'value that is' if count == 1 else 'values that are'} not finite, the first at {first}",
        hint="that checkpoint is damaged or diverged; leave it out, or pass --allow-nonfinite",
    )


def _reach(numbers: F64) -> float:
    """The largest magnitude; infinity where a sum of finite numbers left float64 and became NaN."""
    worst = float(np.abs(numbers).max(initial=0.0))
    return float("inf") if np.isnan(worst) else worst


def _reach_of_sum(step: Step, reader: Reader) -> float:
    if any(tensor.strides for _, tensor in step.terms):
        parts = (factor * to_float64(reader.dense(tensor), tensor.dtype) for factor, tensor in step.terms)
        return _reach(sum(parts, np.zeros(step.shape)) / step.divisor)
    worst = 0.0
    for low, high in iter_blocks(int(np.prod(step.shape, dtype=np.int64)), PIECE):
        total = np.zeros(high - low)
        for factor, tensor in step.terms:
            total += factor * to_float64(_read(tensor, low, high, reader), tensor.dtype)
        worst = max(worst, _reach(total / step.divisor))
    return worst


def _pieces(tensor: Tensor, reader: Reader) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    if tensor.strides is not None:
        yield 0, reader.dense(tensor).reshape(-1)
        return
    for low, high in iter_blocks(tensor.numel, PIECE):
        yield low, _read(tensor, low, high, reader)


def _read(tensor: Tensor, low: int, high: int, reader: Reader) -> npt.NDArray[Any]:
    size = ITEMSIZE[tensor.dtype]
    raw = np.empty((high - low) * size, np.uint8)
    reader.into(tensor, low * size, raw)
    return raw.view(storage_dtype(tensor.dtype))
