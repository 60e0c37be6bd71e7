"""Expression → plan: what each output tensor is made of. Headers only; nothing is computed here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from math import lcm, prod
from operator import itemgetter
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
from clipmerge.weights.expression import (
    Applied,
    Expression,
    Leaf,
    checkpoints_of,
    names_of,
    statistics_of,
)
from clipmerge.weights.input_checks import refuse_bare_vectors, refuse_foreign_statistics

Kind = Literal["sum", "agree", "largest"]


@dataclass(frozen=True, slots=True)
class Step:
    """One output tensor.

    Attributes:
        kind: "sum" is Σ factor·leaf / divisor; "agree" copies integers that must be equal everywhere; "largest" is a
            mean's step counters.
        terms: (factor, leaf), in an order that depends on the contents alone.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: Kind
    terms: tuple[tuple[float, Leaf], ...]
    divisor: float = 1.0

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEMSIZE[self.dtype]

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """Every checkpoint, and file of statistics, whose tensor of this name is read."""
        used = (c for _, leaf in self.terms for c in (*checkpoints_of(leaf), *statistics_of(leaf)))
        return tuple(dict.fromkeys(c for c in used if self.name in c.tensors))

    @property
    def inputs(self) -> list[tuple[float, Tensor]]:
        """(factor, stored tensor) of each term that is a checkpoint."""
        return [(f, leaf.tensors[self.name]) for f, leaf in self.terms if isinstance(leaf, Checkpoint)]

    @property
    def has_methods(self) -> bool:
        """Whether a nonlinear method computes a part of it."""
        return any(isinstance(leaf, Applied) for _, leaf in self.terms)

    @property
    def streams(self) -> bool:
        """Whether it is computed in stretches, and not from whole tensors: integers, transposed ones, most methods."""
        strided = any(c.tensors[self.name].strides is not None for c in self.checkpoints)
        by_entry = all(leaf.streams for _, leaf in self.terms if isinstance(leaf, Applied))
        return self.kind == "sum" and by_entry and not strided


@dataclass(frozen=True, slots=True)
class Plan:
    """Every output tensor by name, and what is read for them."""

    steps: Mapping[str, Step]
    checkpoints: tuple[Checkpoint, ...]

    @property
    def read_bytes(self) -> int:
        read = (c.tensors[name] for name, step in self.steps.items() for c in step.checkpoints)
        return sum(extent.nbytes for tensor in read for extent in tensor.stored)

    @property
    def written_bytes(self) -> int:
        return sum(step.nbytes for step in self.steps.values())


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
    refuse_foreign_statistics(weights)
    refuse_bare_vectors(weights)
    reference, ordered = weights.reference, _canonical(weights)
    held = {leaf: names_of(leaf) for leaf in ordered.terms}
    steps = {
        name: _step(
            name,
            weights,
            {leaf: c for leaf, c in ordered.terms.items() if name in held[leaf]},
            reference,
            dtype,
        )
        for name in weights.names
    }
    return Plan(steps, weights.sources)


def _step(
    name: str,
    weights: Expression,
    terms: Mapping[Leaf, Coefficient],
    reference: Checkpoint,
    dtype: str | None,
) -> Step:
    tensor = reference.tensors.get(name) or weights.tensor(name)
    if not tensor.is_float:  # integers are never averaged: they agree, or they are step counters
        is_counter = name.endswith("num_batches_tracked")
        others = [checkpoint for checkpoint in weights.checkpoints if name in checkpoint.tensors]
        kind: Kind = "largest" if is_counter and weights.base is None else "agree"
        first = [reference] if reference in others else others[:1]
        sources = first if is_counter and weights.base else [*first, *others]
        return Step(name, tensor.dtype, tensor.shape, kind, tuple((1.0, c) for c in dict.fromkeys(sources)))
    used = [(leaf, value) for leaf, c in terms.items() if (value := c.at(name))]
    factors, divisor = [_float(c) for _, c in used], 1.0
    if all(isinstance(leaf, Checkpoint) for leaf, _ in used):
        factors, divisor = integer_factors([c for _, c in used])
    summands = tuple((factor, leaf) for factor, (leaf, _) in zip(factors, used, strict=True))
    return Step(name, dtype or tensor.dtype, tensor.shape, "sum", summands, divisor)


def integer_factors(coefficients: list[Fraction]) -> tuple[list[float], float]:
    """Turn Σ c·x into (Σ n·x) / d, with small integers n where there are some."""
    # Why: 1/3 is no float64, and x/3 + x/3 + x/3 rounds four times, but x + x + x is exact in float64 (an integer of
    # up to 24 bits times a float32's 24 bits fits in 53), and the one division that follows gives x back. So the mean
    # of equal files is that file, and where inputs lie near each other the order of the sum does not show either.
    # Coefficients with large denominators (0.1234567) go as they are, each rounded once to float64.
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
    """Sort the terms by what the leaves contain, not by how they were listed or called."""
    # Float64 addition commutes but does not associate: with three terms or more the order can show in the last bit.
    # A soup must not depend on the order of its files on the command line, and names cannot give the order, or
    # renaming a file would change its soup. So the bytes themselves decide.
    if len(weights.terms) < 3 and all(isinstance(leaf, Checkpoint) for leaf in weights.terms):
        return weights
    return _sorted(weights, _content_keys(weights.sources))[1]


def _sorted(weights: Expression, keys: Mapping[Checkpoint, str]) -> tuple[str, Expression]:
    """A text that says what is computed from which contents, and the terms sorted by it, methods' operands too."""
    parts: list[tuple[str, str, Leaf, Coefficient]] = []
    for leaf, coefficient in weights.terms.items():
        if isinstance(leaf, Checkpoint):
            key = keys[leaf]
        else:
            files = leaf.statistics or (None,) * len(leaf.operands)
            operands = [
                (*_sorted(operand, keys), file) for operand, file in zip(leaf.operands, files, strict=True)
            ]
            if leaf.method.symmetric and not any(isinstance(v, tuple) for v in leaf.options.values()):
                operands.sort(key=itemgetter(0))
            merged = None if leaf.merged is None else _sorted(leaf.merged, keys)
            inside = [*(k for k, _, _ in operands), *([] if merged is None else [f"merged={merged[0]}"])]
            inside += [keys[file] for _, _, file in operands if file is not None]
            key = f"{leaf.method.name}{sorted(leaf.options.items())}({', '.join(inside)})"
            leaf = Applied(
                leaf.method,
                tuple(operand for _, operand, _ in operands),
                leaf.options,
                None if merged is None else merged[1],
                tuple(file for _, _, file in operands if file is not None),
            )
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
