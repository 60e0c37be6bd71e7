"""Look before and after: what a checkpoint holds, how far apart two are, and what a merge will do."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from clipmerge.checkpoint.read import Reader
from clipmerge.checkpoint.tensors import Checkpoint, Tensor
from clipmerge.dtypes import finite, to_float64
from clipmerge.types import Floats, Progress
from clipmerge.weights.applied import Facts, Measured, evaluate
from clipmerge.weights.blocks import BLOCK, MEMORY, default_threads
from clipmerge.weights.check import check
from clipmerge.weights.coefficient import Coefficient
from clipmerge.weights.digest import Digests, for_each_tensor
from clipmerge.weights.expression import Applied, Expression
from clipmerge.weights.measure import measure
from clipmerge.weights.names import TOWERS, block_of, tower_of
from clipmerge.weights.notation import identifiers_of, notation, sum_text
from clipmerge.weights.plan import Plan, Step, make_plan
from clipmerge.weights.reading import ReadWhole, uses_in
from clipmerge.weights.record import read_record
from clipmerge.weights.run import SMALL
from clipmerge.weights.weights import Weights, as_checkpoint, as_weights

PIECE = 1 << 18
"""Elements compared at a time."""


@dataclass(frozen=True, slots=True)
class Part:
    """The tensors of one tower outside its blocks, or of one of its blocks.

    Attributes:
        block: the block's number, None for what lies outside blocks.
        nonfinite: NaN and infinite elements, None where only headers were read.
    """

    tower: str
    block: int | None
    tensors: int
    parameters: int
    nbytes: int
    dtypes: Mapping[str, int]
    nonfinite: int | None


@dataclass(frozen=True, slots=True)
class Summary:
    """See `inspect`."""

    name: str
    path: str | None
    layout: str
    parts: tuple[Part, ...]
    tensors: int
    parameters: int
    nbytes: int
    dtypes: Mapping[str, int]
    nonfinite: Mapping[str, int] | None
    digest: str | None
    kind: str
    record: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """JSON-ready, all fields."""
        return asdict(self)


def inspect(
    checkpoint: str | Path | Checkpoint | Weights,
    *,
    headers: bool = False,
    on_progress: Progress | None = None,
) -> Summary:
    """Summarise a checkpoint: counts, sizes, dtypes, its record, non-finite elements, content digest.

    Args:
        headers: read no tensor: `nonfinite` and `digest` are None.

    Raises:
        RecipeError: an expression that is not one checkpoint.
    """
    held = as_checkpoint(checkpoint)
    digests = Digests([held])
    nonfinite = None if headers else _count_nonfinite(held, digests, on_progress)
    record, parts = read_record(held.metadata), []
    for (tower, block), names in group_names(held.tensors).items():
        bad = None if nonfinite is None else sum(nonfinite.get(name, 0) for name in names)
        parts.append(Part(tower, block, **count([held.tensors[name] for name in names]), nonfinite=bad))
    return Summary(
        name=held.name,
        path=str(held.path) if held.path else None,
        layout=held.layout,
        parts=tuple(parts),
        **count(held.tensors.values()),
        nonfinite=nonfinite,
        digest=None if headers else digests.finish(on_progress)[held],
        kind="a LoRA adapter" if held.factors else "a model" if record.get("total", 1) else "a task vector",
        record=record,
    )


def group_names(names: Iterable[str]) -> dict[tuple[str, int | None], list[str]]:
    """Group tensor names by (tower, block), towers in their usual order, what lies outside blocks first."""
    groups: dict[tuple[str, int | None], list[str]] = {}
    for name in sorted(names):
        groups.setdefault((tower_of(name), block_of(name)), []).append(name)
    order = sorted(groups, key=lambda key: (TOWERS.index(key[0]), -1 if key[1] is None else key[1]))
    return {key: groups[key] for key in order}


def _count_nonfinite(
    checkpoint: Checkpoint, digests: Digests, on_progress: Progress | None
) -> dict[str, int]:
    """Tensor name → how many of its elements are NaN or infinite, where there are some; digests are taken too."""

    def count_bad(name: str, reader: Reader) -> int:
        tensor = checkpoint.tensors[name]
        if not tensor.is_float and not digests.wants(checkpoint, name):
            return 0
        pieces = digests.blocks(checkpoint, name, reader)
        damaged = (raw for raw in pieces if tensor.is_float and not finite(raw, tensor.dtype))
        return sum(int(np.count_nonzero(~np.isfinite(to_float64(raw, tensor.dtype)))) for raw in damaged)

    what = f"reading {checkpoint.name}"
    counts = for_each_tensor(checkpoint, checkpoint.tensors, count_bad, what, on_progress)
    return {name: counts[name] for name in sorted(counts) if counts[name]}


def count_words(words: Iterable[str]) -> dict[str, int]:
    """Count how often each word occurs, sorted by word."""
    return dict(sorted(Counter(words).items()))


def count(tensors: Collection[Tensor]) -> dict[str, Any]:
    """Count tensors, their parameters and bytes, and how many are of each dtype."""
    return {
        "tensors": len(tensors),
        "parameters": sum(tensor.numel for tensor in tensors),
        "nbytes": sum(tensor.nbytes for tensor in tensors),
        "dtypes": count_words(tensor.dtype for tensor in tensors),
    }


@dataclass(frozen=True, slots=True)
class Distance:
    """One part of the model; `tower` is None for all of it.

    Attributes:
        relative: ‖a - b‖ / ‖a‖; None where a is zero.
        largest: the largest |a - b| of one element.
        cosine: between the task vectors a - base and b - base; None without a base or where one is zero.
        vector_a, vector_b: ‖a - base‖ and ‖b - base‖; None without a base.
    """

    tower: str | None
    block: int | None
    tensors: int
    parameters: int
    relative: float | None
    largest: float
    cosine: float | None = None
    vector_a: float | None = None
    vector_b: float | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """See `compare`.

    Attributes:
        differing: names of the tensors in which an element differs, sorted.
    """

    a: str
    b: str
    base: str | None
    parts: tuple[Distance, ...]
    whole: Distance
    differing: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON-ready, all fields."""
        return asdict(self)


def compare(
    a: str | Path | Weights,
    b: str | Path | Weights,
    base: str | Path | Weights | None = None,
    *,
    on_progress: Progress | None = None,
) -> Comparison:
    """Measure relative distances of `b` from `a`, and with a base the cosines of their task vectors.

    Where one of them lacks whole towers or heads (an encoder beside a model), the others are compared.

    Raises:
        MismatchError: names or shapes differ.
    """
    operands = [as_weights(weights) for weights in (a, b, base) if weights is not None]
    first, others = operands[0], operands[1:]
    for other in others:
        if (difference := first - other).terms:
            check(Weights(difference.terms, first.base))
    shared = set(first.names).intersection(
        *(other.names for other in others)
    )  # an encoder lacks whole towers
    names = [name for name in first.names if name in shared and first.tensor(name).is_float]
    parts, differing, done = [], [], 0
    whole = np.zeros(8)
    with Reader([c for w in operands for c in w.checkpoints]) as reader, np.errstate(all="ignore"):
        facts = _facts(operands, reader, on_progress)
        for (tower, block), members in group_names(names).items():
            part = np.zeros(8)
            for name in members:
                unequal = part[2]
                for numbers in _aligned_pieces(operands, name, reader, facts):
                    _add(part, _measures(*numbers))
                if part[2] > unequal:
                    differing.append(name)
                done += 1
                if on_progress:
                    on_progress("comparing", done, len(names))
            parts.append(_distance(tower, block, len(members), part, base is not None))
            _add(whole, part)
        reader.unchanged()
    texts = [*map(repr, operands), None]
    total = _distance(None, None, len(names), whole, base is not None)
    return Comparison(str(texts[0]), str(texts[1]), texts[2], tuple(parts), total, tuple(sorted(differing)))


def _measures(a: Floats, b: Floats, base: Floats | None = None) -> Floats:
    """Of a stretch of two models: the largest |a - b|, then what adds up over stretches: elements, unequal ones, ‖a‖²,
    ‖a - b‖², and of the task vectors ‖u‖², ‖v‖² and u·v."""
    apart = a - b
    vectors = [0.0, 0.0, 0.0]
    if base is not None:
        u, v = a - base, b - base
        vectors = [np.dot(u, u), np.dot(v, v), np.dot(u, v)]
    largest, unequal = np.abs(apart).max(initial=0.0), np.count_nonzero(apart)
    return np.array([largest, a.size, unequal, np.dot(a, a), np.dot(apart, apart), *vectors])


def _add(total: Floats, measures: Floats) -> None:
    total[0] = np.maximum(total[0], measures[0])  # NaN stays NaN
    total[1:] += measures[1:]


def _distance(
    tower: str | None, block: int | None, tensors: int, measures: Floats, has_base: bool
) -> Distance:
    largest, count, _, aa, apart, uu, vv, uv = (float(measure) for measure in measures)
    relative = sqrt(apart / aa) if aa else None
    vectors: tuple[float | None, ...] = ()
    if has_base:
        vectors = (uv / sqrt(uu * vv) if uu and vv else None, sqrt(uu), sqrt(vv))
    return Distance(tower, block, tensors, int(count), relative, largest, *vectors)


def _facts(operands: Sequence[Weights], reader: Reader, on_progress: Progress | None) -> Facts:
    """Return what the methods in these expressions need to know of the whole model."""
    facts: dict[Applied, Measured] = {}
    for weights in operands:
        if any(isinstance(leaf, Applied) for leaf in weights.terms):
            options: dict[str, Any] = {"leaves": weights.terms, "on_progress": on_progress}
            facts |= measure(make_plan(weights), reader, **options)
    return facts


def _aligned_pieces(
    operands: Sequence[Weights], name: str, reader: Reader, facts: Facts
) -> Iterator[tuple[Floats, ...]]:
    """The same stretch of one tensor from every operand, stretch by stretch."""

    def stretches(weights: Weights) -> Iterator[Floats]:
        leaf, coefficient = next(iter(weights.terms.items()))
        if len(weights.terms) == 1 and isinstance(leaf, Checkpoint) and coefficient.at(name) == 1:
            tensor = leaf.tensors[name]
            yield from (to_float64(raw, tensor.dtype) for _, raw in reader.blocks(tensor, PIECE))
        else:
            shape = weights.tensor(name).shape
            read = ReadWhole(reader, name, uses_in(weights.terms))
            computed = evaluate(weights, name, shape, read, facts).reshape(-1)
            yield from (computed[low : low + PIECE] for low in range(0, computed.size, PIECE))

    return zip(*map(stretches, operands), strict=True)


@dataclass(frozen=True, slots=True)
class Input:
    """One checkpoint that is read: its name in the notation, where it is, its tensors' bytes and dtypes."""

    name: str
    path: str | None
    layout: str
    tensors: int
    parameters: int
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


def describe(weights: Expression, *, dtype: str | None = None, threads: int | None = None) -> Description:
    """Describe a merge for people and programs; headers are read, tensors are not.

    Args:
        dtype, threads: as in `Weights.save`.

    Raises:
        RecipeError, MismatchError: what saving would raise before it reads a tensor.
    """
    plan = make_plan(weights, dtype=dtype)
    names = identifiers_of(weights)
    inputs = [
        Input(name, str(c.path) if c.path else None, c.layout, **count(c.tensors.values()))
        for c, name in sorted(names.items(), key=lambda item: item[1])
    ]
    steps: dict[tuple[str, str], list[Step]] = {}
    for step in plan.steps.values():
        steps.setdefault((_formula(step, weights, names), step.dtype), []).append(step)
    groups = [
        Group(
            formula, dtype, len(same), sum(step.nbytes for step in same),
            count_words(tower_of(step.name) for step in same), same[0].name,
        )
        for (formula, dtype), same in steps.items()
    ]  # fmt: skip
    return Description(
        notation=notation(weights),
        total=weights.kind(),
        gives="a model" if weights.kind() else "a task vector",
        inputs=tuple(inputs),
        groups=tuple(groups),
        read_bytes=plan.read_bytes,
        written_bytes=plan.written_bytes,
        memory_bytes=memory_of(plan, threads),
    )


def memory_of(plan: Plan, threads: int | None = None) -> int:
    """Bound the bytes that the pass works in.

    Methods that need whole tensors hold those of all inputs, in float64: each thread a small one, and only one thread a
    large one. Others hold a block of every input, and of what they are given.
    """
    threads = threads or default_threads()
    steps = [step for step in plan.steps.values() if step.has_methods]
    whole = [((len(s.checkpoints) + 8) * s.numel * 8, s.numel <= SMALL) for s in steps if not s.streams]
    small = max((size for size, is_small in whole if is_small), default=0)
    large = max((size for size, is_small in whole if not is_small), default=small)
    blocks = max((2 * len(s.checkpoints) * min(s.numel, BLOCK) * 8 for s in steps if s.streams), default=0)
    return threads * (MEMORY + blocks) + large + (threads - 1) * small


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
