"""Expression → plan: what each output tensor is made of. Headers only; nothing is computed here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from math import lcm, prod
from typing import Literal

import numpy as np
from blake3 import blake3

from clipmerge.checkpoint.read import Reader
from clipmerge.checkpoint.tensors import Checkpoint, Tensor
from clipmerge.dtypes import FLOATS, ITEMSIZE
from clipmerge.errors import RecipeError
from clipmerge.text import did_you_mean
from clipmerge.weights.check import check
from clipmerge.weights.coefficient import Coefficient
from clipmerge.weights.digest import content_digest
from clipmerge.weights.expression import Applied, Expression, Leaf

Kind = Literal["sum", "agree", "largest", "computed"]


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
    leaves: tuple[tuple[float, Leaf], ...] = ()

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEMSIZE[self.dtype]


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


EXACT = 1 << 24
"""Integer coefficients up to here keep integer · float32 exact in float64."""

_SPELLED = {
    "fp64": "F64", "float64": "F64", "double": "F64", "fp32": "F32", "float32": "F32", "float": "F32",
    "fp16": "F16", "float16": "F16", "half": "F16", "bfloat16": "BF16",
    "float8_e4m3fn": "F8_E4M3", "fp8_e4m3": "F8_E4M3", "float8_e5m2": "F8_E5M2", "fp8_e5m2": "F8_E5M2",
}  # fmt: skip

SAMPLED_TENSORS = 16
"""Tensors of each input that are looked at first for what tells the inputs apart."""


def float_dtype(name: str | None) -> str | None:
    """Return safetensors' name of a float dtype: `fp16`, `float16`, `half` and `F16` are `F16`; None stays None.

    Raises:
        RecipeError: it names no float dtype.
    """
    if name is None:
        return None
    short = name.lower().removeprefix("torch.")
    dtype = _SPELLED.get(short, short.upper())
    if dtype not in FLOATS:
        known = [*_SPELLED, *(known.lower() for known in FLOATS)]
        hint = did_you_mean(short, known, "fp32, fp16, bf16, fp64, f8_e4m3 or f8_e5m2")
        raise RecipeError(f"{name!r} is not a float dtype", hint=hint)
    return dtype


def make_plan(weights: Expression, *, dtype: str | None = None) -> Plan:
    """Plan what will be computed, after every check that headers allow.

    Args:
        dtype: the dtype of every float output; None keeps the base's, tensor by tensor.

    Raises:
        RecipeError, MismatchError: see `check`; or the dtype is not a float dtype.
    """
    dtype = float_dtype(dtype)
    check(weights, dtype=dtype)
    reference = weights.reference
    ordered = _canonical(weights)
    steps = {name: _step(name, weights, ordered, reference, dtype) for name in reference.tensors}
    read = sum(tensor.nbytes for step in steps.values() for _, tensor in step.terms)
    read += sum(
        c.tensors[name].nbytes for name, step in steps.items() if step.leaves for c in weights.checkpoints
    )
    return Plan(steps, weights.checkpoints, read, sum(step.nbytes for step in steps.values()))


def _step(
    name: str, weights: Expression, ordered: Expression, reference: Checkpoint, dtype: str | None
) -> Step:
    tensor = reference.tensors[name]
    if not tensor.is_float:
        return _integer_step(name, weights, reference)
    coefficients = [(leaf, coefficient.at(name)) for leaf, coefficient in ordered.terms.items()]
    used = [(leaf, c) for leaf, c in coefficients if c]
    out = dtype or tensor.dtype
    points = [leaf for leaf, _ in used if isinstance(leaf, Checkpoint)]
    if len(points) < len(used):
        leaves = tuple((_float(c), leaf) for leaf, c in used)
        return Step(name, out, tensor.shape, "computed", (), 1.0, weights.checkpoints, leaves)
    factors, divisor = integer_factors([c for _, c in used])
    terms = tuple((factor, point.tensors[name]) for factor, point in zip(factors, points, strict=True))
    return Step(name, out, tensor.shape, "sum", terms, divisor, tuple(points))


def _integer_step(name: str, weights: Expression, reference: Checkpoint) -> Step:
    """Integers are never averaged: they agree, or they are step counters."""
    tensor = reference.tensors[name]
    counter = name.endswith("num_batches_tracked")
    kind: Kind = "agree"
    sources = (reference, *(c for c in weights.checkpoints if c is not reference))
    if counter and weights.base is None:
        kind = "largest"
    elif counter:
        sources = (reference,)
    terms = tuple((1.0, c.tensors[name]) for c in sources)
    return Step(name, tensor.dtype, tensor.shape, kind, terms, 1.0, sources)


def integer_factors(coefficients: list[Fraction]) -> tuple[list[float], float]:
    """Turn Σ c·x into (Σ n·x) / d, with small integers n where there are some.

    So the mean of equal files is that file: 1/3 is no float64, and x/3 + x/3 + x/3 rounds four times, but x + x + x
    is exact in float64 (an integer of up to 24 bits times a float32's 24 bits fits in 53) and the division that
    follows gives x back. The order of the sum does not show either, where the inputs lie near each other.
    Coefficients with large denominators (0.1234567) go as they are, each rounded once to float64.
    """
    divisor = lcm(*(c.denominator for c in coefficients)) if coefficients else 1
    factors = [c.numerator * (divisor // c.denominator) for c in coefficients]
    if divisor <= EXACT and all(abs(n) <= EXACT for n in factors):
        return [float(n) for n in factors], float(divisor)
    return [_float(c) for c in coefficients], 1.0


def _float(coefficient: Fraction) -> float:
    try:
        return float(coefficient)
    except OverflowError:
        raise RecipeError("a coefficient is larger than float64 holds") from None


def _canonical(weights: Expression) -> Expression:
    """Sort the terms by what the leaves contain, not by how they were listed or called.

    Float64 addition commutes but does not associate: with three terms or more the order can show in the last bit.
    Names cannot give the order, or renaming a file would change its soup.
    """
    if len(weights.terms) < 3 and all(isinstance(leaf, Checkpoint) for leaf in weights.terms):
        return weights
    return _sorted(weights, _content_keys(weights.checkpoints))[1]


def _sorted(weights: Expression, keys: Mapping[Checkpoint, str]) -> tuple[str, Expression]:
    """A text that says what is computed from which contents, and the terms sorted by it, methods' operands too."""
    parts: list[tuple[str, str, Leaf, Coefficient]] = []
    for leaf, coefficient in weights.terms.items():
        if isinstance(leaf, Checkpoint):
            key = keys[leaf]
        else:
            operands = [_sorted(operand, keys) for operand in leaf.operands]
            key = f"{leaf.method.name}{sorted(leaf.options.items())}({', '.join(k for k, _ in operands)})"
            leaf = Applied(leaf.method, [operand for _, operand in operands], leaf.options)
        parts.append((key, str(coefficient), leaf, coefficient))  # equal contents: coefficients decide
    parts.sort(key=lambda part: part[:2])
    text = " + ".join(f"{coefficient}*{key}" for key, coefficient, _, _ in parts)
    return text, Expression({leaf: coefficient for _, _, leaf, coefficient in parts}, None)


def _content_keys(checkpoints: Sequence[Checkpoint]) -> dict[Checkpoint, str]:
    """Give each checkpoint a text that only its contents decide; different contents, different texts.

    Finetuned models differ wherever one looks, so a few bytes do. Where some inputs look the same, more bytes are
    read, at last all of them.
    """
    with Reader(checkpoints) as reader:
        for count in (SAMPLED_TENSORS, None):
            keys = {checkpoint: _sample_digest(checkpoint, reader, count) for checkpoint in checkpoints}
            if len(set(keys.values())) == len(keys):
                return keys
    return {checkpoint: key + content_digest(checkpoint) for checkpoint, key in keys.items()}


def _sample_digest(checkpoint: Checkpoint, reader: Reader, count: int | None) -> str:
    """Digest names, shapes, dtypes and first 64 bytes of some `count` tensors, or of all."""
    names = sorted(checkpoint.tensors)
    digest = blake3()
    for name in names[:: max(1, len(names) // count) if count else 1]:
        tensor = checkpoint.tensors[name]
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        for _, first in islice(reader.blocks(tensor, 64 // ITEMSIZE[tensor.dtype]), 1):
            digest.update(first.view(np.uint8).data)
    return digest.hexdigest()
