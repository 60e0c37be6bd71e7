"""What a merge will do, said before it does it: inputs, what each tensor gets, bytes and memory."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from math import prod
from typing import Any

from clipmerge.checkpoint.tensors import ITEMSIZE
from clipmerge.weights.blocks import Buffers, default_threads
from clipmerge.weights.coefficient import number_text
from clipmerge.weights.names import tower_of
from clipmerge.weights.notation import identifiers_of, notation
from clipmerge.weights.plan import Plan, Step, make_plan
from clipmerge.weights.weights import Weights


@dataclass(frozen=True, slots=True)
class Input:
    """One checkpoint that is read: its name in the notation, where it is, its tensors' bytes and dtypes."""

    name: str
    path: str | None
    layout: str
    tensors: int
    nbytes: int
    dtypes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Group:
    """Output tensors that are computed alike.

    Attributes:
        formula: what each of them gets, such as `0.6*base + 0.4*cars`.
        towers: how many of them lie in each tower.
        example: the first name.
    """

    formula: str
    dtype: str
    tensors: int
    nbytes: int
    towers: Mapping[str, int]
    example: str


@dataclass(frozen=True, slots=True)
class Description:
    """See `describe`."""

    notation: str
    total: int
    gives: str
    inputs: tuple[Input, ...]
    groups: tuple[Group, ...]
    read_bytes: int
    written_bytes: int
    memory_bytes: int

    def to_json(self) -> dict[str, Any]:
        """JSON-ready, all fields."""
        return asdict(self)


def describe(
    weights: Weights, plan: Plan | None = None, *, dtype: str | None = None, threads: int | None = None
) -> Description:
    """The plan of a merge for people and programs; headers are read, tensors are not.

    Args:
        plan: what `make_plan` gave, where it is at hand.
        dtype: as in `Weights.save`, where it is not.
        threads: as in `Weights.save`.

    Raises:
        RecipeError, MismatchError: what saving would raise before it reads a tensor.
    """
    plan = plan or make_plan(weights, dtype=dtype)
    names = identifiers_of(weights)
    inputs = tuple(
        Input(
            name,
            str(checkpoint.path) if checkpoint.path else None,
            checkpoint.layout,
            len(checkpoint.tensors),
            sum(tensor.nbytes for tensor in checkpoint.tensors.values()),
            _counts(tensor.dtype for tensor in checkpoint.tensors.values()),
        )
        for checkpoint, name in sorted(names.items(), key=lambda item: item[1])
    )
    grouped: dict[tuple[str, str], list[Step]] = {}
    for step in plan.steps.values():
        grouped.setdefault((_formula(step, weights, names), step.dtype), []).append(step)
    groups = tuple(_group(formula, dtype, steps) for (formula, dtype), steps in grouped.items())
    return Description(
        notation(weights),
        weights.kind(),
        "a model" if weights.kind() else "a task vector",
        inputs,
        groups,
        plan.read_bytes,
        plan.written_bytes,
        memory_of(plan, threads),
    )


def memory_of(plan: Plan, threads: int | None = None) -> int:
    """Bytes that the pass works in at most; tensors of nonlinear methods are held whole, in float64."""
    whole = [(len(s.leaves) + 2) * prod(s.shape) * 8 for s in plan.steps.values() if s.kind == "computed"]
    return (threads or default_threads()) * Buffers().nbytes + max(whole, default=0)


def _group(formula: str, dtype: str, steps: list[Step]) -> Group:
    size = sum(prod(step.shape) * ITEMSIZE[dtype] for step in steps)
    return Group(
        formula, dtype, len(steps), size, _counts(tower_of(step.name) for step in steps), steps[0].name
    )


def _formula(step: Step, weights: Weights, names: Mapping[Any, str]) -> str:
    if step.kind == "agree":
        return "integers that must agree"
    if step.kind == "largest":
        return "the largest step counter"
    if step.kind == "computed":
        return notation(weights)
    divisor = Fraction(step.divisor)
    parts = sorted(
        (source is not weights.base, names[source], Fraction(repr(factor)) / divisor)
        for source, (factor, _) in zip(step.sources, step.terms, strict=True)
    )
    text = ""
    for _, name, value in parts:
        sign, size = ("-", -value) if value < 0 else ("+", value)
        part = name if size == 1 else f"{number_text(size)}*{name}"
        text += f" {sign} {part}" if text else part if sign == "+" else f"-{part}"
    return text or "0"


def _counts(words: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for word in words:
        found[word] = found.get(word, 0) + 1
    return dict(sorted(found.items()))
