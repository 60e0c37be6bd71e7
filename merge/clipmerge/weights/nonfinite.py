"""Where a merge goes wrong: the input that is not finite, or the output that overflows. Read in pieces."""

from typing import NoReturn

import numpy as np

from clipmerge.checkpoint.read import Reader
from clipmerge.checkpoint.tensors import Tensor
from clipmerge.dtypes import TABLE, finite, to_float64
from clipmerge.errors import NonFiniteError
from clipmerge.types import Floats
from clipmerge.weights.plan import Step

PIECE = 1 << 18
"""Elements looked at together."""


def refuse_inputs(step: Step, reader: Reader) -> None:
    """Look through every input of a step.

    Raises:
        NonFiniteError: one holds NaN or infinity; says which, how many, and where the first one stands.
    """
    for source in step.sources:
        tensor = source.tensors[step.name]
        count, first = count_nonfinite(tensor, reader)
        if count:
            raise NonFiniteError(
                f"{source.path or source.name}: tensor {step.name!r} holds {count} "
                f"{'value that is' if count == 1 else 'values that are'} not finite, "
                f"the first at {[int(i) for i in np.unravel_index(first, tensor.shape)]}",
                hint="that checkpoint is damaged or diverged; leave it out, or pass --allow-nonfinite",
            )


def count_nonfinite(tensor: Tensor, reader: Reader) -> tuple[int, int]:
    """Count the elements that are NaN or infinite. Returns how many, and the flat index of the first."""
    count = first = 0
    for start, raw in reader.blocks(tensor, PIECE):
        if not finite(raw, tensor.dtype):
            bad = np.flatnonzero(~np.isfinite(to_float64(raw, tensor.dtype)))
            first = first if count else start + int(bad[0])
            count += bad.size
    return count, first


def explain(step: Step, reader: Reader, numbers: Floats | None = None) -> None:
    """Say why a step's output is not finite, if it is not.

    Args:
        numbers: the output before it is narrowed; computed again in pieces where it is not given.

    Raises:
        NonFiniteError: an input is not finite, or the output overflows.
    """
    refuse_inputs(step, reader)
    worst = _largest(numbers) if numbers is not None else _largest_of_sum(step, reader)
    if not worst <= (TABLE[step.dtype].largest or 0.0):
        refuse_overflow(step, worst)


def refuse_overflow(step: Step, worst: float) -> NoReturn:
    """Refuse an output that its dtype cannot hold."""
    wider = step.dtype not in ("F64", "F32")
    raise NonFiniteError(
        f"tensor {step.name!r} reaches {worst:.6g}, more than {step.dtype} holds ({TABLE[step.dtype].largest:.6g})",
        hint="write a wider dtype: --dtype fp32" if wider else "use smaller scales",
    )


def _largest(numbers: Floats) -> float:
    """The largest magnitude; infinity where a sum of finite numbers left float64 and became NaN."""
    worst = float(np.abs(numbers).max(initial=0.0))
    return float("inf") if np.isnan(worst) else worst


def _largest_of_sum(step: Step, reader: Reader) -> float:
    worst = 0.0
    for parts in zip(*(reader.blocks(tensor, PIECE) for _, tensor in step.terms), strict=True):
        total = np.zeros(parts[0][1].size)
        for (factor, tensor), (_, raw) in zip(step.terms, parts, strict=True):
            total += factor * to_float64(raw, tensor.dtype)
        worst = max(worst, _largest(total / step.divisor))
    return worst
