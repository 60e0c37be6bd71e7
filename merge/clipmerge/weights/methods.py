"""The table of nonlinear methods, and a method applied to expressions.

A new per-tensor method is one function in `clipmerge.ops`, one row here and one test.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from clipmerge.errors import RecipeError
from clipmerge.ops.points import model_stock, slerp
from clipmerge.ops.vectors import magmax
from clipmerge.text import nearest
from clipmerge.weights.coefficient import Coefficient
from clipmerge.weights.weights import Weights

F64 = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Method:
    """A rule over whole tensors.

    Attributes:
        function: one float64 array per operand, then the options by name → float64 array of the same shape.
        takes: what its operands must be: "points" (models, total 1) or "vectors" (task vectors, total 0).
        gives: the total of the result.
        options: name → default.
        operands: how many it takes, (least, most); None is any number.
    """

    name: str
    function: Callable[..., F64]
    takes: Literal["points", "vectors"]
    gives: Literal[0, 1]
    options: Mapping[str, float] = field(default_factory=dict)
    operands: tuple[int, int | None] = (1, None)


METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method("slerp", slerp, takes="points", gives=1, options={"t": 0.5}, operands=(2, 2)),
        Method("model_stock", model_stock, takes="points", gives=1, operands=(3, None)),
        Method("magmax", magmax, takes="vectors", gives=0),
    )
}


class Applied:
    """A method over expressions: a leaf of a larger expression, computed tensor by tensor."""

    __slots__ = ("__weakref__", "method", "operands", "options")

    def __init__(self, method: Method, operands: Sequence[Weights], options: Mapping[str, float]) -> None:
        self.method = method
        self.operands = tuple(operands)
        self.options = dict(options)

    @property
    def total(self) -> int:
        """1 for a point, 0 for a vector."""
        return self.method.gives

    def evaluate(self, operands: Sequence[F64]) -> F64:
        """One tensor of the result, from the same tensor of each operand."""
        return self.method.function(*operands, **self.options)


def apply(name: str, operands: Sequence[Weights], **options: float) -> Weights:
    """The named method over `operands`, lazily.

    Raises:
        RecipeError: no such method or option, the wrong number of operands, or points where it takes vectors.
    """
    method = METHODS.get(name)
    if method is None:
        raise RecipeError(f"there is no method {name!r}", hint=_did_you_mean(name, METHODS))
    for option in options:
        if option not in method.options:
            raise RecipeError(f"{name} has no option {option!r}", hint=_did_you_mean(option, method.options))
    least, most = method.operands
    if len(operands) < least or (most is not None and len(operands) > most):
        wanted = f"{least}" if most == least else f"at least {least}"
        raise RecipeError(f"{name} takes {wanted} operands, not {len(operands)}")
    for operand in operands:
        if operand.kind() != (1 if method.takes == "points" else 0):
            meant = (
                "models (total 1)" if method.takes == "points" else "task vectors (total 0), such as a - base"
            )
            raise RecipeError(f"{name} takes {meant}, not {operand!r}")
    leaf = Applied(method, operands, {**method.options, **options})
    return Weights({leaf: Coefficient.of(1)}, leaf)


def _did_you_mean(name: str, known: Mapping[str, object]) -> str:
    close = nearest(name, known)
    return f"did you mean {close!r}?" if close else f"known: {', '.join(sorted(known)) or 'none'}"
