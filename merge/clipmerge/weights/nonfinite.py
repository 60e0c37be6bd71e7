"""Say where a merge goes wrong: the input that is not finite, or the output that overflows."""

from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from clipmerge.checkpoint.read import Reader
from clipmerge.dtypes import TABLE, finite, to_float64
from clipmerge.errors import NonFiniteError
from clipmerge.weights.plan import Step

PIECE = 1 << 18
"""Elements looked at together."""


def refuse(step: Step, reader: Reader, numbers: npt.NDArray[Any]) -> NoReturn:
    """Refuse an output that is not finite, and say why.

    Args:
        numbers: the output, or a block of it, before it is narrowed.

    Raises:
        NonFiniteError: an input is not finite, or the output is more than its dtype holds.
    """
    refuse_inputs(step, reader)
    worst = float(np.abs(numbers).max(initial=0.0))
    worst = float("inf") if np.isnan(worst) else worst  # a sum of finite numbers left float64
    raise NonFiniteError(
        f"tensor {step.name!r} reaches {worst:.6g}, more than {step.dtype} holds ({TABLE[step.dtype].largest:.6g})",
        hint="use smaller scales" if step.dtype in ("F64", "F32") else "write a wider dtype: --dtype fp32",
    )


def refuse_inputs(step: Step, reader: Reader) -> None:
    """Look through every input of a step.

    Raises:
        NonFiniteError: one holds NaN or infinity; says which, how many, and where the first one stands.
    """
    for source in step.checkpoints:
        tensor, count, first = source.tensors[step.name], 0, 0
        for start, raw in reader.blocks(tensor, PIECE):
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
