"""The table of nonlinear methods.

A new method is one function in `clipmerge.ops`, one row here and one test: the notation, the public function of that
name, the command's list and the records of files follow from the row. `expression.Method` says what a row holds.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from inspect import getdoc
from math import isfinite
from numbers import Real
from pathlib import Path
from typing import Any

from clipmerge.errors import RecipeError
from clipmerge.ops import matrices, points, statistics, vectors
from clipmerge.text import did_you_mean
from clipmerge.weights import measure
from clipmerge.weights.expression import Applied, E, Expression, Method, Option, OptionValue
from clipmerge.weights.names import absent_parts
from clipmerge.weights.statistics_files import statistics_for

_SCOPE = Option(
    "model", "rank entries over the whole model, or each tensor's own", choices=("model", "tensor")
)
_OFF_DIAGONAL = Option(0.95, "of the Gram matrices, what all but the diagonal is times", 0, 1)
_ISO_GRID = ("0", "3", "0.1")

METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        # task vectors in, task vector out
        Method(
            "ties", vectors.ties, "vectors", 0, "entries", measure=measure.ties, grid=("0", "2", "0.1"),
            options={"density": Option(0.2, "share of entries that each vector keeps", 0, 1), "scope": _SCOPE},
        ),
        Method(
            "dare", vectors.dare, "vectors", 0,
            options={
                "p": Option(0.9, "probability that an entry is dropped", 0, 0.999),
                "seed": Option(0, "of what is drawn", 0),
            },
        ),
        Method(
            "breadcrumbs", vectors.breadcrumbs, "vectors", 0, "entries", measure=measure.breadcrumbs,
            options={
                "beta": Option(0.1, "share of largest entries that is dropped", 0, 1),
                "gamma": Option(0.8, "share of smallest entries that is dropped", 0, 1),
                "scope": Option("tensor", _SCOPE.says, choices=_SCOPE.choices),
            },
        ),
        Method("magmax", vectors.magmax, "vectors", 0, "entries", symmetric=False),
        Method(
            "consensus", vectors.consensus, "vectors", 0, "entries",
            options={
                "threshold": Option(0.6, "how far a task's entry counts against the others'", 0, several=True),
                "least": Option(2, "tasks that an entry must matter to", 1),
            },
        ),
        Method(
            "lines", vectors.lines, "vectors", 0, "entries", measure=measure.lines,
            options={
                "alpha": Option(None, "factor of the first block; default: by the vectors' 1-norms"),
                "beta": Option(None, "what the last block has more; default: 1 - alpha"),
            },
        ),
        Method("equalise", vectors.equalise, "vectors", 0, "entries", measure=measure.equalise),
        Method("tsv", matrices.tsv, "vectors", 0, "matrices", distinct=True, grid=("0", "2", "0.1")),
        Method("iso_c", matrices.iso_c, "vectors", 0, "matrices", distinct=True, grid=_ISO_GRID),
        Method(
            "iso_cts", matrices.iso_cts, "vectors", 0, "matrices", distinct=True, grid=_ISO_GRID,
            options={"common": Option(0.8, "share of directions that the sum keeps", 0, 1)},
        ),
        Method(
            "gram", matrices.gram, "vectors", 0, "matrices", distinct=True, grid=("0", "2", "0.1"),
            options={
                "weights": Option(
                    "equal", "a task's weight: 1, or over its squared norm", choices=("equal", "norm")
                ),
                "ridge": Option(0.0, "added to the diagonal; 0: the pseudoinverse", 0),
            },
        ),
        Method(
            "ace", matrices.ace, "vectors", 0, "matrices", distinct=True, grid=("0", "2", "0.1"),
            options={"epsilon": Option(1e-5, "added to the diagonal of each task's covariance", 0)},
        ),
        Method(
            "svc", matrices.svc, "vectors", 0, "matrices",
            options={"alpha": Option(0.1, "least share of a direction that is a task's own", 1e-6, 1)},
        ),
        # models in, model out
        Method(
            "slerp", points.slerp, "points", 1, operands=(2, 2), symmetric=False, renamed={"t": "alpha"},
            options={"alpha": Option(0.5, "0 is the first, 1 the second")},
        ),
        Method("model_stock", points.model_stock, "points", 1, operands=(3, None), symmetric=False),
        Method("karcher", points.karcher, "points", 1),
        Method("geometric_median", points.geometric_median, "points", 1),
        Method(
            "cart", points.cart, "points", 1, "matrices",
            options={
                "rank": Option(0.08, "share of directions that each model keeps", 0, 1),
                "scale": Option(1.0, "of the models' directions"),
            },
        ),
        # models and statistics of data in, model out
        Method(
            "fisher", statistics.fisher, "points", 1, "entries", statistics="fisher",
            options={
                "weights": Option(1.0, "a factor on each model's Fisher information", 0, several=True),
                "floor": Option(0.0, "the least Fisher information of an entry; 1e-8 in WiSE-FT's code", 0),
            },
        ),
        Method(
            "regmean", statistics.regmean, "points", 1, "layers", statistics="regmean",
            options={"off_diagonal": _OFF_DIAGONAL},
        ),
        Method(
            "regmean_plus", statistics.regmean_plus, "points", 1, "layers", statistics="regmean_plus",
            options={"off_diagonal": _OFF_DIAGONAL},
        ),
    )
}  # fmt: skip


def apply(
    name: str | Method,
    operands: Sequence[E],
    merged: E | None = None,
    statistics: "Sequence[Expression | str | Path] | None" = None,
    **options: OptionValue,
) -> E:
    """Apply a method to `operands`, lazily.

    Args:
        name: of the table; or a method of one's own, which no notation can name.
        merged: what another method made of the operands, for those that work on it.
        statistics: of methods that need them, a file of statistics for each operand; None: those beside the operands.

    Raises:
        RecipeError: no such method or option, the wrong number of operands, points where it takes vectors, or no
            statistics.
    """
    method = name if isinstance(name, Method) else METHODS.get(name)
    if method is None:
        raise RecipeError(f"there is no method {name!r}", hint=_did_you_mean(str(name), METHODS))
    name = method.name
    options = {method.renamed.get(option, option): value for option, value in options.items()}
    known = method.all_options
    for option in options:
        if option not in known:
            raise RecipeError(f"{name} has no option {option!r}", hint=_did_you_mean(option, known))
    chosen = {
        key: _value(name, key, options.get(key, o.default), o, len(operands)) for key, o in known.items()
    }
    chosen = {
        key: value for key, value in chosen.items() if key in method.options or value != known[key].default
    }
    if "space" in chosen and "scope" in chosen:
        if options.get("scope") == "model":
            raise RecipeError(
                f"{name} ranks entries of each matrix in a space of its own", hint="leave out scope='model'"
            )
        chosen["scope"] = "tensor"
    least, most = method.operands
    if len(operands) < least or (most is not None and len(operands) > most):
        wanted = f"{least}" if most == least else f"at least {least}"
        raise RecipeError(f"{name} takes {wanted} operands, not {len(operands)}")
    if merged is not None and not method.takes_merged:
        raise RecipeError(
            f"{name} has no operand 'merged'", hint="svc and lines work on what another method made"
        )
    for operand in (*operands, *([] if merged is None else [merged])):
        if operand.kind() != (1 if method.takes == "points" else 0):
            meant = (
                "models (total 1)" if method.takes == "points" else "task vectors (total 0), such as a - base"
            )
            raise RecipeError(f"{name} takes {meant}, not {operand!r}")
    if method.takes == "vectors":
        every = _zero_where_missing([*operands, *([] if merged is None else [merged])])
        operands, merged = every[: len(operands)], None if merged is None else every[-1]
    files = statistics_for(method, operands, statistics)
    return type(operands[0]).of(Applied(method, tuple(operands), chosen, merged, files))


def _value(method: str, name: str, value: OptionValue, option: Option, operands: int) -> OptionValue:
    """Return an option's value in its own type."""
    what = f"the option {name!r} of {method}"
    if isinstance(value, list | tuple):
        if not option.several or len(value) != operands:
            raise RecipeError(
                f"{what} takes one number" + (f", or one for each operand: {operands}" * option.several)
            )
        return tuple(float(_number(what, number, option)) for number in value)
    if isinstance(option.default, bool):
        if not isinstance(value, bool):
            raise RecipeError(f"{what} is True or False, not {value!r}")
        return value
    if option.choices:
        if value not in option.choices:
            hint = did_you_mean(str(value), option.choices)
            raise RecipeError(f"{what} is one of {', '.join(option.choices)}, not {value!r}", hint=hint)
        return value
    if value is None and option.default is None:
        return None
    number = _number(what, value, option)
    return int(number) if isinstance(option.default, int) and number == int(number) else number


def _number(what: str, value: object, option: Option) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise RecipeError(f"{what} takes a number, not {value!r}")
    number = float(value)
    low, high = option.low, option.high
    fits = (low is None or number >= low) and (high is None or number <= high)
    if not fits or not isfinite(number):
        limits = f"at least {low:g}" if high is None and low is not None else f"between {low} and {high}"
        raise RecipeError(f"{what} is {limits if low is not None else 'a finite number'}, not {number:g}")
    return number


def _zero_where_missing(vectors: Sequence[E]) -> list[E]:
    """Make a task vector zero in the towers and heads that others have and it lacks."""
    every: set[str] = set().union(*(vector.names for vector in vectors))
    parts = [absent_parts(every.difference(vector.names), every) for vector in vectors]
    masks = [{**dict.fromkeys(gone or (), 0), "*": 1} for gone in parts]
    return [
        type(v)({leaf: c.masked(mask) for leaf, c in v.terms.items()}, v.base) if len(mask) > 1 else v
        for v, mask in zip(vectors, masks, strict=True)
    ]


def function_of(
    method: Method, open_all: Callable[[list[Any]], Sequence[Expression]]
) -> Callable[..., Expression]:
    """Make the Python function of a method: `slerp(a, b, 0.3)`, `ties([a - zs, b - zs], density=0.2)`.

    It takes its operands one by one or as one list, then its options by position or by name. A path stands for the
    checkpoint there; a text by itself is one as long as the method lacks operands.

    Args:
        open_all: what opens the paths among operands.
    """

    def call(*arguments: Any, **options: Any) -> Expression:
        operands: list[Any] = []
        values: list[Any] = []
        for argument in arguments:
            is_path = isinstance(argument, str) and not values and len(operands) < method.operands[0]
            if isinstance(argument, Expression | Path) or is_path:
                operands.append(argument)
            elif isinstance(argument, Sequence) and not isinstance(argument, str):
                operands += argument
            else:
                values.append(argument)
        if len(values) > len(method.options):
            raise RecipeError(f"{method.name} takes {len(method.options)} options, not {len(values)}")
        if not operands:
            raise RecipeError(f"{method.name} takes at least {method.operands[0]} operands, not 0")
        positional = dict(zip(method.options, values, strict=False))
        merged: Expression = apply(method.name, open_all(operands), **positional, **options)
        return merged

    call.__name__ = call.__qualname__ = method.name
    call.__doc__ = method.function.__doc__
    return call


def _did_you_mean(name: str, known: Mapping[str, object]) -> str | None:
    return did_you_mean(name, known, f"known: {', '.join(sorted(known)) or 'none'}")


def describe(method: Method) -> dict[str, Any]:
    """Say in words what a row of the table holds: what it takes and gives, its options, its source."""
    text = getdoc(method.function) or ""
    source = re.search(r"Source: (.+)", text)
    options = {
        name: {"default": option.default, "says": option.says, "choices": list(option.choices)}
        for name, option in method.all_options.items()
    }
    kinds = {"vectors": "task vectors → task vector", "points": "models → model"}
    merged = ["merged=their sum"] if method.takes_merged else []
    merged += ["statistics=those beside the models"] if method.statistics else []
    return {
        "name": method.name,
        "takes": kinds[method.takes],
        "says": text.partition("\n")[0],
        "options": options,
        "shown": merged + [f"{name}={option.default}" for name, option in method.options.items()],
        "source": source.group(1).rstrip(".") if source else "",
    }
