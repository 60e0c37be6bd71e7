"""One tensor (or a stretch of one) of an expression: linear sums in float64, methods through their functions.

What a method needs to know of the whole model (`Measured`) is found before, by `measure.py`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import lru_cache, partial, reduce
from operator import add, itemgetter
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from array_api_compat import array_namespace

from clipmerge.checkpoint.tensors import Checkpoint
from clipmerge.errors import NonFiniteError
from clipmerge.ops.spaces import merge_in
from clipmerge.types import Array, Floats, Reals
from clipmerge.weights.expression import Applied, Expression, Leaf
from clipmerge.weights.names import is_transposed, matrices_of
from clipmerge.weights.plan import integer_factors
from clipmerge.weights.reading import Read, ReadLent, back, is_lent, lend

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Measured:
    """What was found of a method's operands over the whole model.

    Attributes:
        groups: operands (by number) that are equal and count once; None: all differ.
        factors: what each operand is scaled by first.
        arguments: further keywords of the method's function.
        gpu: where matrices are decomposed; None: here.
    """

    groups: Sequence[Sequence[int]] | None = None
    factors: Sequence[float] | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    gpu: "torch.device | None" = None


Facts: TypeAlias = Mapping[Applied, Measured]


def evaluate(weights: Expression, name: str, shape: tuple[int, ...], read: Read, facts: Facts) -> Floats:
    """Compute one tensor of an expression, in float64, from the same tensor of its checkpoints.

    Args:
        shape: of what `read` gives: the tensor's, or a stretch's.
    """
    used = _used(weights, name)
    factors, divisor = integer_factors([value for _, value in used])
    terms = zip(factors, (leaf for leaf, _ in used), strict=True)
    return weighted(terms, divisor, name, shape, read, facts)


def _used(weights: Expression, name: str) -> list[tuple[Leaf, Fraction]]:
    """Return leaves and coefficients of what is not zero in a tensor; an adapter is, where it has no such tensor."""
    return [
        (leaf, value)
        for leaf, c in weights.terms.items()
        if (value := c.at(name)) and (isinstance(leaf, Applied) or name in leaf.tensors)
    ]


def weighted(
    terms: Iterable[tuple[float, Leaf]],
    divisor: float,
    name: str,
    shape: tuple[int, ...],
    read: Read,
    facts: Facts,
    memory: Floats | None = None,
) -> Floats:
    """Σ factor·leaf / divisor in float64, added in the order given, from the first one on: -0 stays -0.

    Args:
        memory: where the sum may lie.
    """
    summed: Floats | None = None
    for factor, leaf in terms:
        array: Array = (
            read(leaf) if isinstance(leaf, Checkpoint) else apply_to_tensor(leaf, name, shape, read, facts)
        )
        if summed is None:
            if memory is None:
                summed = _wide_copy(array).reshape(shape)
            else:
                np.copyto(summed := memory.reshape(shape), array)
            if factor != 1:
                summed *= factor
        elif factor == 1:
            summed += array
        elif factor == -1:
            summed -= array
        elif is_lent(array):
            summed += _wide_copy(array) * factor
        else:
            summed += np.multiply(array, factor, dtype=np.float64)
    if summed is None:
        return np.zeros(shape)
    if divisor != 1:
        summed /= divisor
    return summed


def _wide_copy(array: Array) -> Array:
    """Return a copy in float64, where the array is."""
    return array.clone().double() if is_lent(array) else np.array(array, np.float64)


def apply_to_tensor(applied: Applied, name: str, shape: tuple[int, ...], read: Read, facts: Facts) -> Reals:
    """Compute one tensor of a method's result; arguments as for `evaluate`.

    Raises:
        NonFiniteError: a method of matrices was let see NaN or infinity.
    """
    if 0 in shape:
        return np.zeros(shape)
    method, known = applied.method, facts[applied]
    arrays = operands_of(applied, name, shape, read, facts)
    keywords: dict[str, Any] = {key: applied.options[key] for key in method.options} | {**known.arguments}
    if "name" in method.keywords:
        keywords["name"] = name
    if "transposed" in method.keywords:
        keywords["transposed"] = is_transposed(name)
    if method.statistics is not None:
        there = all(name in file.tensors for file in applied.statistics)
        keywords["statistics"] = [read(file) for file in applied.statistics] if there else None
        if method.on == "layers" and there:
            keywords["statistics"] = [
                lend(np.asarray(s, np.float64), known.gpu) for s in keywords["statistics"]
            ]
    merged = None
    if applied.merged is not None:
        merged = evaluate(applied.merged, name, shape, read, facts)
    space = applied.options.get("space")
    if method.on != "matrices" and space is None:
        if method.takes_merged:
            keywords["merged"] = None if merged is None else merged.astype(arrays[0].dtype, copy=False)
        return back(method.function(*arrays, **keywords))
    if not all(array_namespace(array).isfinite(array).all() for array in arrays):
        message = f"{method.name} cannot work on {name!r}, which is not finite"
        raise NonFiniteError(message, hint="leave that checkpoint out")
    count = matrices_of(name, shape, fused=bool(applied.options.get("fused")))
    if count == 0:
        if method.on != "matrices":
            return method.function(*arrays, **keywords)
        if merged is not None:
            return merged
        summed: Reals = reduce(add, arrays)
        return summed if method.takes_merged else summed / len(arrays)
    function = method.function if method.on == "matrices" else _on_the_cpu(method.function)
    parts = []
    for number, rows in enumerate(np.split(np.arange(shape[0]), count)):
        part = slice(rows[0], rows[-1] + 1)
        more: dict[str, Any] = {}
        if method.takes_merged:
            more["merged"] = None if merged is None else lend(merged[part], known.gpu)
        if "name" in keywords and count > 1:
            more["name"] = f"{name}[{number}]"  # what is drawn for q is not drawn for k
        merge = partial(function, **{**keywords, **more})
        matrices = [lend(array[part], known.gpu) for array in arrays]
        merged_part = merge(*matrices) if space is None else merge_in(str(space), merge, *matrices)
        parts.append(back(merged_part))
    return np.concatenate(parts) if count > 1 else parts[0]


def _on_the_cpu(function: Callable[..., Reals]) -> Callable[..., Array]:
    """Return a rule of entries, which computes in numpy, for matrices that may be on a GPU."""

    def call(*arrays: Array, **keywords: Any) -> Array:
        gpu = arrays[0].device if is_lent(arrays[0]) else None
        return lend(function(*map(back, arrays), **keywords), gpu)

    return call


def operands_of(applied: Applied, name: str, shape: tuple[int, ...], read: Read, facts: Facts) -> list[Array]:
    """Compute a method's operands: equal ones once, scaled where that was asked for.

    They are float32 where single entries count and no checkpoint holds more, rounded once; else float64, and on the GPU
    where there are matrices in them that it decomposes.
    """
    known = facts.get(applied, Measured())
    by_entry = applied.method.on == "entries" and not any(_holds_float64(o, name) for o in applied.operands)
    gpu = known.gpu if _is_decomposed(applied, name, shape) else None
    lent = read if gpu is None else ReadLent(read, gpu)
    arrays = [_operand(operand, name, shape, read, facts, by_entry, lent) for operand in applied.operands]
    arrays = [lend(array, gpu) for array in arrays]
    if known.groups is not None:
        arrays = [reduce(add, each) / len(each) for each in ([arrays[i] for i in g] for g in known.groups)]
    if known.factors is not None:
        arrays = [array * float(factor) for array, factor in zip(arrays, known.factors, strict=True)]
    return arrays


def _is_decomposed(applied: Applied, name: str, shape: tuple[int, ...]) -> bool:
    """Whether the method's own function takes matrices out of this tensor."""
    if applied.method.on == "layers":
        return all(name in file.tensors for file in applied.statistics)
    fused = bool(applied.options.get("fused"))
    return applied.method.on == "matrices" and matrices_of(name, shape, fused=fused) > 0


def _operand(
    operand: Expression,
    name: str,
    shape: tuple[int, ...],
    read: Read,
    facts: Facts,
    by_entry: bool,
    lent: Read,
) -> Array:
    """Compute one operand.

    Args:
        lent: reads for sums of checkpoints alone; what is in methods' operands is read by `read`.
    """
    if not by_entry:
        plain = all(isinstance(leaf, Checkpoint) for leaf in operand.terms)
        return evaluate(operand, name, shape, lent if plain else read, facts)
    if pair := _difference(operand, name):  # one rounding in float32, and no detour
        return read.difference(*pair)
    return evaluate(operand, name, shape, read, facts).astype(np.float32)


@lru_cache(maxsize=256)
def _holds_float64(operand: Expression, name: str) -> bool:
    return any(c.tensors[name].dtype == "F64" for c in operand.checkpoints if name in c.tensors)


@lru_cache(maxsize=256)  # asked again for every stretch of a tensor
def _difference(operand: Expression, name: str) -> tuple[Checkpoint, Checkpoint] | None:
    """Return the two checkpoints of which a tensor of the operand is the plain difference, None where it is more."""
    match sorted(((value, leaf) for leaf, value in _used(operand, name)), key=itemgetter(0)):
        case [(-1, Checkpoint() as b), (1, Checkpoint() as a)]:
            return a, b
    return None
