"""The table of nonlinear methods.

A new per-tensor method is one function in `clipmerge.ops`, one row here and one test: the notation, the public
function of that name and the records of files follow from the row.
"""

from collections.abc import Callable, Mapping, Sequence

from clipmerge.errors import RecipeError
from clipmerge.ops import points, vectors
from clipmerge.text import did_you_mean
from clipmerge.weights.expression import Applied, E, Expression, Method
from clipmerge.weights.names import absent_parts

METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Method(
            "slerp", points.slerp, takes="points", gives=1, options={"alpha": 0.5}, operands=(2, 2),
            renamed={"t": "alpha"},
        ),
        Method("model_stock", points.model_stock, takes="points", gives=1, operands=(3, None)),
        Method("magmax", vectors.magmax, takes="vectors", gives=0),
    )
}  # fmt: skip


def apply(name: str, operands: Sequence[E], **options: float) -> E:
    """Apply the named method to `operands`, lazily.

    Raises:
        RecipeError: no such method or option, the wrong number of operands, or points where it takes vectors.
    """
    method = METHODS.get(name)
    if method is None:
        raise RecipeError(f"there is no method {name!r}", hint=_did_you_mean(name, METHODS))
    options = {method.renamed.get(option, option): value for option, value in options.items()}
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
    if method.takes == "vectors":
        operands = _zero_where_missing(operands)
    return type(operands[0]).of(Applied(method, tuple(operands), {**method.options, **options}))


def _zero_where_missing(vectors: Sequence[E]) -> list[E]:
    """Make a task vector zero in the towers and heads that others have and it lacks."""
    every: set[str] = set().union(*(vector.names for vector in vectors))
    parts = [absent_parts(every.difference(vector.names), every) for vector in vectors]
    masks = [{**dict.fromkeys(gone or (), 0), "*": 1} for gone in parts]
    return [
        type(v)({leaf: c.masked(mask) for leaf, c in v.terms.items()}, v.base) if len(mask) > 1 else v
        for v, mask in zip(vectors, masks, strict=True)
    ]


def function_of(method: Method) -> Callable[..., Expression]:
    """Make the Python function of a method: `slerp(a, b, 0.3)`, `model_stock([base, a, b])`.

    It takes its operands one by one or as one list, then its options by position or by name.
    """

    def call(*arguments: Expression | Sequence[Expression] | float, **options: float) -> Expression:
        operands: list[Expression] = []
        numbers: list[float] = []
        for argument in arguments:
            if isinstance(argument, Expression):
                operands.append(argument)
            elif isinstance(argument, Sequence):
                operands += argument
            else:
                numbers.append(argument)
        if len(numbers) > len(method.options):
            raise RecipeError(f"{method.name} takes {len(method.options)} options, not {len(numbers)}")
        return apply(method.name, operands, **dict(zip(method.options, numbers, strict=False)), **options)

    call.__name__ = call.__qualname__ = method.name
    call.__doc__ = method.function.__doc__
    return call


def _did_you_mean(name: str, known: Mapping[str, object]) -> str | None:
    return did_you_mean(name, known, f"known: {', '.join(sorted(known)) or 'none'}")
