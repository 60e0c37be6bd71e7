"""Describe what a merge will do, before it does it: inputs, what each tensor gets, bytes and memory."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any

from clipmerge.checkpoint.tensors import Checkpoint
from clipmerge.weights.blocks import Buffers, default_threads
from clipmerge.weights.coefficient import Coefficient
from clipmerge.weights.expression import Expression
from clipmerge.weights.names import tower_of
from clipmerge.weights.notation import identifiers_of, notation, sum_text
from clipmerge.weights.plan import Plan, Step, make_plan


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
    weights: Expression, plan: Plan | None = None, *, dtype: str | None = None, threads: int | None = None
) -> Description:
    """Describe a merge for people and programs; headers are read, tensors are not.

    Args:
        plan: what `make_plan` gave, where it is at hand.
        dtype: as in `Weights.save`, where it is not.
        threads: as in `Weights.save`.

    Raises:
        RecipeError, MismatchError: what saving would raise before it reads a tensor.
    """
    plan = plan or make_plan(weights, dtype=dtype)
    names = identifiers_of(weights)
    groups: dict[tuple[str, str], list[Step]] = {}
    for step in plan.steps.values():
        groups.setdefault((_formula(step, weights, names), step.dtype), []).append(step)
    return Description(
        notation=notation(weights),
        total=weights.kind(),
        gives="a model" if weights.kind() else "a task vector",
        inputs=tuple(_input(c, name) for c, name in sorted(names.items(), key=lambda item: item[1])),
        groups=tuple(_group(formula, dtype, steps) for (formula, dtype), steps in groups.items()),
        read_bytes=plan.read_bytes,
        written_bytes=plan.written_bytes,
        memory_bytes=memory_of(plan, threads),
    )


def memory_of(plan: Plan, threads: int | None = None) -> int:
    """Bound the bytes that the pass works in; tensors of nonlinear methods are held whole, in float64."""
    held = [(len(s.terms) + 2) * s.numel * 8 for s in plan.steps.values() if s.has_methods]
    return (threads or default_threads()) * Buffers().nbytes + max(held, default=0)


def count_words(words: Iterable[str]) -> dict[str, int]:
    """Count how often each word occurs, sorted by word."""
    return dict(sorted(Counter(words).items()))


def _input(checkpoint: Checkpoint, name: str) -> Input:
    tensors = checkpoint.tensors.values()
    path = str(checkpoint.path) if checkpoint.path else None
    nbytes = sum(tensor.nbytes for tensor in tensors)
    return Input(name, path, checkpoint.layout, len(tensors), nbytes, count_words(t.dtype for t in tensors))


def _group(formula: str, dtype: str, steps: list[Step]) -> Group:
    towers = count_words(tower_of(step.name) for step in steps)
    return Group(formula, dtype, len(steps), sum(step.nbytes for step in steps), towers, steps[0].name)


def _formula(step: Step, weights: Expression, names: Mapping[Checkpoint, str]) -> str:
    if step.kind == "agree":
        return "integers that must agree"
    if step.kind == "largest":
        return "the largest step counter"
    if step.has_methods:
        return notation(weights)
    terms = sorted(
        (source is not weights.base, names[source], Fraction(repr(factor)) / Fraction(step.divisor))
        for source, (factor, _) in zip(step.checkpoints, step.terms, strict=True)
    )
    return sum_text([(Coefficient.of(value), name) for _, name, value in terms])
