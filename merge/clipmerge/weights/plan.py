"""An expression → what each output tensor is made of. Headers only; nothing is computed here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from typing import TYPE_CHECKING, Literal

from blake3 import blake3

from clipmerge.checkpoint.read import Reader
from clipmerge.checkpoint.tensors import FLOATS, Checkpoint, Tensor
from clipmerge.errors import RecipeError
from clipmerge.text import nearest
from clipmerge.weights.check import check, reference_of
from clipmerge.weights.coefficient import Coefficient
from clipmerge.weights.methods import Applied
from clipmerge.weights.weights import Weights

if TYPE_CHECKING:
    from clipmerge.weights.weights import Leaf

EXACT = 1 << 24
"""Integer coefficients up to here keep integer · float32 exact in float64."""

_SPELLED = {
    "fp64": "F64", "float64": "F64", "double": "F64", "fp32": "F32", "float32": "F32", "float": "F32",
    "fp16": "F16", "float16": "F16", "half": "F16", "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3", "fp8_e4m3": "F8_E4M3", "float8_e5m2": "F8_E5M2", "fp8_e5m2": "F8_E5M2",
}  # fmt: skip

Kind = Literal["sum", "agree", "largest", "computed"]


LOOKED_AT = 16
"""Tensors of each input that are looked at first for what tells the inputs apart."""


@dataclass(frozen=True, slots=True)
class Step:
    """One output tensor.

    Attributes:
        kind: "sum" is Σ factor·input / divisor; "agree" copies integers that must be equal everywhere;
            "largest" is a mean's step counters; "computed" needs whole tensors (a nonlinear method).
        terms: (factor, stored tensor), in an order that depends on the contents alone.
        sources: the checkpoint of each term; every checkpoint that a "computed" step reads.
        leaves: of a "computed" step: (coefficient, leaf).
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: Kind
    terms: tuple[tuple[float, Tensor], ...]
    divisor: float
    sources: tuple[Checkpoint, ...]
    leaves: "tuple[tuple[float, Leaf], ...]" = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """Every output tensor by name, what is read for them, and the size of the work in bytes."""

    steps: Mapping[str, Step]
    checkpoints: tuple[Checkpoint, ...]
    read_bytes: int
    written_bytes: int

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The outputs' names, dtypes and shapes; their bytes are nowhere yet."""
        return {name: Tensor(step.dtype, step.shape, ()) for name, step in self.steps.items()}


def float_dtype(name: str | None) -> str | None:
    """Safetensors' name of a float dtype: `fp16`, `float16`, `half` and `F16` are `F16`; None stays None.

    Raises:
        RecipeError: it names no float dtype.
    """
    if name is None:
        return None
    short = name.lower().removeprefix("torch.")
    found = _SPELLED.get(short, short.upper())
    if found not in FLOATS:
        close = nearest(short, [*_SPELLED, *(known.lower() for known in FLOATS)])
        raise RecipeError(
            f"{name!r} is not a float dtype",
            hint=f"did you mean {close}?" if close else "fp32, fp16, bf16, fp64, f8_e4m3 or f8_e5m2",
        )
    return found


def make_plan(weights: Weights, *, dtype: str | None = None) -> Plan:
    """What will be computed, after every check that headers allow.

    Args:
        dtype: the dtype of every float output; None keeps the base's, tensor by tensor.

    Raises:
        RecipeError, MismatchError: see `check`; or the dtype is not a float dtype.
    """
    dtype = float_dtype(dtype)
    check(weights, dtype=dtype)
    reference = reference_of(weights)
    ordered = _canonical(weights)
    steps = {name: _step(name, weights, ordered, reference, dtype) for name in reference.tensors}
    read = sum(tensor.nbytes for step in steps.values() for _, tensor in step.terms)
    read += sum(
        c.tensors[name].nbytes for name, step in steps.items() if step.leaves for c in weights.checkpoints
    )
    from clipmerge.checkpoint.tensors import ITEMSIZE

    written = sum(reference.tensors[n].numel * ITEMSIZE[s.dtype] for n, s in steps.items())
    return Plan(steps, weights.checkpoints, read, written)


def _step(
    name: str,
    weights: Weights,
    ordered: Weights,
    reference: Checkpoint,
    dtype: str | None,
) -> Step:
    own = reference.tensors[name]
    if not own.is_float:
        return _integer_step(name, weights, reference)
    coefficients = [(leaf, coefficient.at(name)) for leaf, coefficient in ordered.terms.items()]
    used = [(leaf, c) for leaf, c in coefficients if c]
    out = dtype or own.dtype
    if any(not isinstance(leaf, Checkpoint) for leaf, _ in used):
        leaves = tuple((_float(c), leaf) for leaf, c in used)
        return Step(name, out, own.shape, "computed", (), 1.0, weights.checkpoints, leaves)
    factors, divisor = integer_factors([c for _, c in used])
    points = [leaf for leaf, _ in used if isinstance(leaf, Checkpoint)]
    terms = tuple((factor, point.tensors[name]) for factor, point in zip(factors, points, strict=True))
    return Step(name, out, own.shape, "sum", terms, divisor, tuple(points))


def _integer_step(name: str, weights: Weights, reference: Checkpoint) -> Step:
    """Integers are never averaged: they agree, or they are step counters."""
    own = reference.tensors[name]
    everywhere = weights.checkpoints
    counter = name.endswith("num_batches_tracked")
    kind: Kind = "agree"
    if counter and weights.base is None:
        kind = "largest"
    elif counter:
        everywhere = (reference,)
    else:
        everywhere = (reference, *(c for c in everywhere if c is not reference))
    terms = tuple((1.0, c.tensors[name]) for c in everywhere)
    return Step(name, own.dtype, own.shape, kind, terms, 1.0, everywhere)


def integer_factors(coefficients: list[Fraction]) -> tuple[list[float], float]:
    """Σ c·x as (Σ n·x) / d, small integers where there are some: a mean sums exactly and divides once."""
    divisor = lcm(*(c.denominator for c in coefficients)) if coefficients else 1
    whole = [c.numerator * (divisor // c.denominator) for c in coefficients]
    if divisor <= EXACT and all(abs(n) <= EXACT for n in whole):
        return [float(n) for n in whole], float(divisor)
    return [_float(c) for c in coefficients], 1.0


def _float(coefficient: Fraction) -> float:
    try:
        return float(coefficient)
    except OverflowError:
        raise RecipeError("a coefficient is larger than float64 holds") from None


def _canonical(weights: Weights) -> Weights:
    """The same sum in an order that depends on what the leaves contain, not on how they were listed or called."""
    leaves = list(weights.terms)
    if len(leaves) < 3 and all(isinstance(leaf, Checkpoint) for leaf in leaves):
        return weights  # float64 addition commutes: two terms have one order
    return _ordered(weights, _content_keys(weights.checkpoints))[1]


def _ordered(weights: Weights, keys: Mapping[Checkpoint, str]) -> tuple[str, Weights]:
    """A text that says what is computed from which contents, and the terms sorted by it, methods' operands too."""
    parts: list[tuple[str, str, Leaf, Coefficient]] = []
    for leaf, coefficient in weights.terms.items():
        if isinstance(leaf, Checkpoint):
            key = keys[leaf]
        else:
            operands = [_ordered(operand, keys) for operand in leaf.operands]
            key = f"{leaf.method.name}{sorted(leaf.options.items())}({', '.join(k for k, _ in operands)})"
            leaf = Applied(leaf.method, [operand for _, operand in operands], leaf.options)
        parts.append((key, str(coefficient), leaf, coefficient))  # equal contents: coefficients decide
    parts.sort(key=lambda part: part[:2])
    text = " + ".join(f"{coefficient}*{key}" for key, coefficient, _, _ in parts)
    return text, Weights({leaf: coefficient for _, _, leaf, coefficient in parts}, None)


def _content_keys(checkpoints: Sequence[Checkpoint]) -> dict[Checkpoint, str]:
    """A text for each checkpoint that only its contents decide; different contents, different texts."""
    with Reader(checkpoints) as reader:
        for count in (
            LOOKED_AT,
            None,
        ):  # finetuned models differ wherever one looks; some differ in a few tensors only
            keys = {checkpoint: _heads(checkpoint, reader, count) for checkpoint in checkpoints}
            if len(set(keys.values())) == len(keys):
                return keys
    from clipmerge.weights.digest import content_digest

    return {checkpoint: key + content_digest(checkpoint) for checkpoint, key in keys.items()}


def _heads(checkpoint: Checkpoint, reader: Reader, count: int | None) -> str:
    """A cheap digest of the contents: names, shapes, dtypes and first 64 bytes of some `count` tensors, or of all."""
    names = sorted(checkpoint.tensors)
    digest = blake3()
    for name in names[:: max(1, len(names) // count) if count else 1]:
        tensor = checkpoint.tensors[name]
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        digest.update(reader.head(tensor, 64))
    return digest.hexdigest()
