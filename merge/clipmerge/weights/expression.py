"""`Expression`: Σ coefficient · checkpoint, the value that everything in this room takes.

Whatever is written with `+ - * /` collapses at once to one exact coefficient for each leaf, so that the longest
expression is still one streaming weighted sum. `Weights` is this value with the verbs that read and write files.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cache
from inspect import signature
from typing import Any, Literal, Self, TypeAlias, TypeVar
from weakref import WeakKeyDictionary

from clipmerge.checkpoint.tensors import Checkpoint, Tensor
from clipmerge.errors import MismatchError, RecipeError
from clipmerge.types import Reals
from clipmerge.weights.coefficient import Coefficient, Scalar, number_text
from clipmerge.weights.model_records import combined
from clipmerge.weights.names import absent_parts
from clipmerge.weights.record import model_record, needs_quick_gelu, prompts_of, read_record

TOLERANCE = Fraction(1, 10**6)
"""How far a total may be from 0 or 1: softmaxed coefficients sum to 1 only up to their own rounding."""


OptionValue: TypeAlias = int | float | str | bool | tuple[float, ...] | None


@dataclass(frozen=True, slots=True)
class Option:
    """A parameter of a method.

    Attributes:
        default: None: worked out.
        says: what it is, for people.
        low, high: the least and largest number.
        choices: the words that it may be.
        several: whether it may be a list, one number an operand.
    """

    default: OptionValue
    says: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()
    several: bool = False


EQUALISE = Option(False, "scale every task vector to the median of their norms first")
SPACE = Option(
    "full",
    "core, knots: align low-rank updates first, and rank entries of each matrix there",
    choices=("full", "core", "knots"),
)
FUSED = Option(False, "take q, k and v in one tensor as one matrix")


@dataclass(frozen=True, slots=True)
class Method:
    """A nonlinear rule: a row of `methods.METHODS`.

    Attributes:
        function: one array per operand, then keywords → array of the same shape. The keywords are the options, what
            `measure` returns, and, where the function has a parameter of that name, `name` (the tensor's) and `merged`.
        takes: what its operands must be: "points" (models, total 1) or "vectors" (task vectors, total 0).
        gives: the total of the result.
        on: what the function looks at: single entries, so that it may be given pieces; whole tensors; matrices
            (`names.matrices_of`), other tensors being the mean (or `merged`); or linear layers with statistics. What
            is on matrices or layers is given arrays of numpy, or of torch on a GPU.
        options: name → what it may be.
        operands: how many it takes, (least, most); None is any number.
        symmetric: whether the order of the operands means nothing.
        distinct: whether equal operands count once.
        measure: what the function needs to know of the whole model (see `applied.Model`), as keywords.
        grid: first, last and step of the coefficients to try on the result.
        renamed: what an option was called in files written before → its name now.
        statistics: the kind of statistics of data that it needs of each operand, a checkpoint.
    """

    name: str
    function: Callable[..., Reals]
    takes: Literal["points", "vectors"]
    gives: Literal[0, 1]
    on: Literal["entries", "tensors", "matrices", "layers"] = "tensors"
    options: Mapping[str, Option] = field(default_factory=dict)
    operands: tuple[int, int | None] = (1, None)
    symmetric: bool = True
    distinct: bool = False
    measure: Callable[..., Mapping[str, Any]] | None = None
    grid: tuple[str, str, str] = ("0", "1", "0.05")
    renamed: Mapping[str, str] = field(default_factory=dict)
    statistics: str | None = None

    @property
    def all_options(self) -> dict[str, Option]:
        """Its own options, and those of every method of its kind."""
        shared = {"equalise": EQUALISE} if self.takes == "vectors" and self.name != "equalise" else {}
        if shared and not self.takes_merged:
            shared["space"] = SPACE
        return {**self.options, **shared, **({"fused": FUSED} if self.on == "matrices" else {})}

    @property
    def keywords(self) -> frozenset[str]:
        """The parameters of the function."""
        return _keywords(self.function)

    @property
    def takes_merged(self) -> bool:
        """Whether it works on what another method made of the operands: `merged=`, by default their sum."""
        return "merged" in self.keywords


@cache
def _keywords(function: Callable[..., Reals]) -> frozenset[str]:
    return frozenset(signature(function).parameters)


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Applied:
    """A method over expressions: a leaf of a larger expression, computed tensor by tensor.

    Attributes:
        options: a value for each of `method.options`, and for shared ones that are not the default.
        merged: what another method made of the operands, where that is given.
        statistics: of methods that need them, a file of statistics for each operand.
    """

    method: Method
    operands: "tuple[Expression, ...]"
    options: Mapping[str, OptionValue]
    merged: "Expression | None" = None
    statistics: tuple[Checkpoint, ...] = ()

    @property
    def decomposes(self) -> bool:
        """Whether it decomposes matrices, which a GPU does sooner."""
        return self.method.on in ("matrices", "layers") or "space" in self.options

    @property
    def inputs(self) -> "tuple[Expression, ...]":
        """Every expression that it is computed from."""
        return self.operands if self.merged is None else (*self.operands, self.merged)

    @property
    def streams(self) -> bool:
        """Whether it can be computed piece by piece."""
        return (
            self.method.on == "entries"
            and self.options.get("scope") != "tensor"
            and "space" not in self.options
            and all(i.streams for i in self.inputs)
        )


Leaf: TypeAlias = Checkpoint | Applied


def checkpoints_of(leaf: Leaf) -> Iterator[Checkpoint]:
    """List the checkpoints of a leaf, as often as a method's operands name them."""
    if isinstance(leaf, Checkpoint):
        yield leaf
        return
    for operand in leaf.inputs:
        for inner in operand.terms:
            yield from checkpoints_of(inner)


def statistics_of(leaf: Leaf) -> tuple[Checkpoint, ...]:
    """List the files of statistics that a leaf and the methods inside it need."""
    return tuple(file for applied in applied_in([leaf]) for file in applied.statistics)


def names_of(leaf: Leaf) -> Set[str]:
    """Return the names of a leaf's tensors, of a method's those of all its operands."""
    if isinstance(leaf, Checkpoint):
        return leaf.tensors.keys()
    return set().union(*(operand.names for operand in leaf.inputs))


def is_sparse(leaf: Leaf) -> bool:
    """Whether a leaf is zero wherever it has no tensor: an adapter, or what a method makes of adapters alone."""
    if isinstance(leaf, Checkpoint):
        return leaf.is_sparse
    return all(is_sparse(inner) for operand in leaf.inputs for inner in operand.terms)


def applied_in(leaves: Iterable[Leaf]) -> Iterator[Applied]:
    """List the methods among leaves and inside them, each after those that it is computed from."""
    for leaf in leaves:
        if isinstance(leaf, Applied):
            for operand in leaf.inputs:
                yield from applied_in(operand.terms)
            yield leaf


class Expression:
    """Σ coefficient · leaf.

    Attributes:
        terms: leaf (a checkpoint, or a nonlinear method's result) → coefficient, in the order written.
        base: the leaf that names dtypes, step counters and whatever a pattern leaves alone; None for a mean,
            where every input counts the same.
    """

    __slots__ = ("base", "terms")

    def __init__(self, terms: Mapping[Leaf, Coefficient], base: Leaf | None) -> None:
        self.terms = {leaf: c for leaf, c in _completed(terms, base).items() if c}
        self.base = base if base is None or base in self.terms else next(iter(self.terms), None)

    @classmethod
    def of(cls, leaf: Leaf) -> Self:
        """The expression that is one leaf."""
        return cls({leaf: Coefficient.of(1)}, leaf)

    # -- algebra -----------------------------------------------------------------------------------------

    def __add__(self, other: Self) -> Self:
        if not isinstance(other, Expression):
            return NotImplemented
        terms = dict(self.terms)
        for leaf, coefficient in other.terms.items():
            terms[leaf] = terms[leaf] + coefficient if leaf in terms else coefficient
        return type(self)(terms, self.base if self.terms else other.base)

    def __mul__(self, factor: "Scalar | Mapping[str, float] | Coefficient") -> Self:
        if isinstance(factor, Expression):
            raise RecipeError("weights times weights means nothing", hint="multiply by a number or a mapping")
        by = Coefficient.of(factor)
        return type(self)({leaf: c * by for leaf, c in self.terms.items()}, self.base)

    __rmul__ = __mul__

    def __truediv__(self, divisor: "Scalar | Coefficient") -> Self:
        if isinstance(divisor, Expression):
            return NotImplemented
        return self * (Coefficient.of(1) / Coefficient.of(divisor))

    def __neg__(self) -> Self:
        return self * -1

    def __sub__(self, other: Self) -> Self:
        if not isinstance(other, Expression):
            return NotImplemented
        return self + -other

    # -- what it is --------------------------------------------------------------------------------------

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """Every checkpoint it reads, each once, in the order written."""
        return tuple(dict.fromkeys(c for leaf in self.terms for c in checkpoints_of(leaf)))

    @property
    def statistics(self) -> tuple[Checkpoint, ...]:
        """Every file of statistics that methods need, each once."""
        return tuple(dict.fromkeys(file for leaf in self.terms for file in statistics_of(leaf)))

    @property
    def sources(self) -> tuple[Checkpoint, ...]:
        """Everything that is read: checkpoints, then files of statistics."""
        return (*self.checkpoints, *self.statistics)

    @property
    def streams(self) -> bool:
        """Whether it can be computed piece by piece."""
        return all(leaf.streams for leaf in self.terms if isinstance(leaf, Applied))

    @property
    def reference(self) -> Checkpoint:
        """The checkpoint whose names and dtypes count: the base, or of a method's result the first operand's."""
        if isinstance(self.base, Checkpoint):
            return self.base
        if self.base is not None:
            return self.base.operands[0].reference
        return min(self.checkpoints, key=lambda c: (c.is_sparse, c.name, str(c.path)))

    @property
    def names(self) -> tuple[str, ...]:
        """The names of what is computed, sorted: all that a checkpoint has.

        A difference of an encoder and a whole model is as the encoder: what only one side has is left out.
        """
        leaves = {leaf: names_of(leaf) for leaf in self.terms if not is_sparse(leaf)}
        if not leaves:
            return tuple(sorted(set().union(*map(names_of, self.terms))))
        first, *others = leaves.values()
        if all(names == first for names in others):
            return tuple(sorted(first))
        every: set[str] = set().union(*leaves.values())
        partial = {name for name in every if any(name not in names for names in leaves.values())}
        if not partial or self.total:
            return tuple(sorted(every))

        def is_left_out(name: str) -> bool:
            held = [
                (value, leaf)
                for leaf in leaves
                if name in leaves[leaf] and (value := self.terms[leaf].at(name))
            ]
            return not held or (len(held) == 1 and sum(value * total_of(leaf) for value, leaf in held) != 0)

        return tuple(sorted(name for name in every if name not in partial or not is_left_out(name)))

    def tensor(self, name: str) -> Tensor:
        """Return the stored tensor that decides shape and dtype: the base's, or of another that has the name."""
        if (tensor := self.reference.tensors.get(name)) is not None:
            return tensor
        having = (c for c in self.checkpoints if name in c.tensors)
        return min(having, key=lambda c: (c.is_sparse, c.name, str(c.path))).tensors[name]

    @property
    def total(self) -> Fraction:
        """The sum of the coefficients, each times its leaf's own total: 1 is a model, 0 a task vector.

        Raises:
            RecipeError: per-name coefficients make the total differ between tensors.
        """
        summed = sum((c * Coefficient.of(total_of(leaf)) for leaf, c in self.terms.items()), Coefficient({}))
        if summed.constant is not None:
            return summed.constant
        names = sorted(set().union(*map(names_of, self.terms)))
        totals = {name: summed.at(name) for name in names}
        if max(totals.values()) - min(totals.values()) <= TOLERANCE:
            return max(totals.values())
        first = names[0]
        other = next(name for name in names if totals[name] != totals[first])
        raise RecipeError(
            f"the total is {number_text(totals[first])} for {first!r} "
            f"but {number_text(totals[other])} for {other!r}",
            hint="scale differences: base + {pattern: number}*(a - base)",
        )

    def kind(self) -> int:
        """Return 1 for a model, 0 for a task vector.

        Raises:
            RecipeError: the total is neither.
        """
        if not self.terms:
            raise RecipeError("every coefficient is zero: there is nothing to compute")
        total = self.total
        for kind in (1, 0):
            if abs(total - kind) <= TOLERANCE:
                return kind
        hint = (
            "did you mean mean([...])?"
            if total == len(self.terms)
            else "did you mean base + scale*(a - base)?"
        )
        shown = number_text(total) if total.denominator < 1000 else f"{float(total):.6g}"
        raise RecipeError(f"total is {shown}: neither a model (1) nor a task vector (0)", hint=hint)

    @property
    def record(self) -> dict[str, Any]:
        """What clipmerge wrote into the base's (or first checkpoint's) file: provenance, model; {} otherwise."""
        first = self.base if isinstance(self.base, Checkpoint) else next(iter(self.checkpoints), None)
        return read_record(first.metadata) if first else {}

    @property
    def prompts(self) -> list[dict[str, Any]]:
        """What the checkpoints record of their prompts, each entry once, in an order that no listing decides."""
        entries = (entry for checkpoint in self.checkpoints for entry in prompts_of(checkpoint))
        return [json.loads(text) for text in sorted({json.dumps(entry, sort_keys=True) for entry in entries})]

    @property
    def model(self) -> dict[str, Any] | None:
        """What the checkpoints say of their model: {"name", "config", "preprocess"}; None where none does.

        Raises:
            MismatchError: two checkpoints say different things.
        """
        # The base's own first; among equals not the first listed, so that the order of a soup decides nothing.
        records = [(c, record) for c in self.checkpoints if (record := model_record(c)) is not None]
        records.sort(key=lambda said: (said[0] is not self.base, json.dumps(said[1], sort_keys=True)))
        said = combined([(str(c.path or c.name), record) for c, record in records])
        quick = [c for c in self.checkpoints if needs_quick_gelu(c)]
        if said and quick and isinstance(said.get("config"), dict) and not said["config"].get("quick_gelu"):
            name, plain = str(quick[0].path or quick[0].name), said.get("name")
            raise MismatchError(
                f"{name} needs QuickGELU, the configuration of {plain} has none",
                hint=f"say which holds with --model, such as {plain}-quickgelu",
            )
        return said


E = TypeVar("E", bound=Expression)


def _completed(terms: Mapping[Leaf, Coefficient], base: Leaf | None) -> Mapping[Leaf, Coefficient]:
    """Count as the base's what other leaves lack: whole towers and heads, never a tensor inside one.

    So a task vector that lacks a tower is zero there, whatever is added to what in which order, and
    `base + 1*(encoder - base)` still has the base's text tower. Where the base has no such tower, and the leaves
    without it do not cancel, the terms stay as they are, for `check` to refuse.
    """
    leaves = {leaf: names_of(leaf) for leaf in terms if not is_sparse(leaf)}
    first: Set[str] = next(iter(leaves.values()), set())
    if all(names == first for names in leaves.values()):
        return terms
    every: set[str] = set().union(*leaves.values())
    completed, moved, needed = dict(terms), Coefficient({}), set[str]()
    for leaf, names in leaves.items():
        missing, coefficient = every - names, terms[leaf]
        parts = absent_parts(missing, every) if missing else None
        masked = coefficient.masked({**dict.fromkeys(parts, 0), "*": 1}) if parts else coefficient
        if masked != coefficient:
            completed[leaf] = masked
            moved = moved + (coefficient - masked) * Coefficient.of(total_of(leaf))
            needed |= missing
    if base is not None and needed <= leaves.get(base, set()):
        completed[base] = completed[base] + moved
        return completed
    return terms if moved else completed


def total_of(leaf: Leaf) -> int:
    """1 for a point, 0 for a vector."""
    if isinstance(leaf, Applied):
        return leaf.method.gives
    return 0 if "vector" in leaf.extra else int(read_record(leaf.metadata).get("total", 1))


_vectors: "WeakKeyDictionary[Checkpoint, Checkpoint]" = WeakKeyDictionary()


def as_vector(weights: E) -> E:
    """Take a checkpoint for a task vector, a difference, though its file does not say that it is one.

    An adapter over its base is the adapter alone.

    Raises:
        RecipeError: the weights are not one checkpoint.
    """
    adapters = [leaf for leaf in weights.terms if isinstance(leaf, Checkpoint) and leaf.factors is not None]
    if len(adapters) == 1 and weights.terms[adapters[0]].constant == 1 and weights.kind() == 1:
        return type(weights).of(adapters[0])
    leaf, *others = weights.terms
    if others or not isinstance(leaf, Checkpoint) or weights.terms[leaf].constant != 1:
        hint = "a difference of checkpoints is a vector already: a - base"
        raise RecipeError("vector takes one checkpoint", hint=hint)
    if not total_of(leaf):
        return weights
    if leaf not in _vectors:
        _vectors[leaf] = replace(leaf, extra={**leaf.extra, "vector": True})
    return type(weights).of(_vectors[leaf])


def interpolate(a: E, b: E, alpha: Scalar | Mapping[str, float] | Coefficient) -> E:
    """Return (1 - alpha)·a + alpha·b; `weights.interpolate` says more."""
    return type(a)((a + (b - a) * alpha).terms, a.base)


def mean(weights: Iterable[E]) -> E:
    """Average expressions, in whatever order.

    Raises:
        RecipeError: there is nothing to average.
    """
    items = list(weights)
    if not items:
        raise RecipeError("the mean of no checkpoints is undefined", hint="give at least one checkpoint")
    averaged = baseless_sum(items) / len(items)
    return averaged if len(items) > 1 else type(averaged)(averaged.terms, items[0].base)


def baseless_sum(weights: Sequence[E]) -> E:
    """Add expressions of which none is the base, in whatever order: what `sum([...])` writes."""
    terms: dict[Leaf, Coefficient] = {}
    for each in weights:
        for leaf, coefficient in each.terms.items():
            terms[leaf] = terms[leaf] + coefficient if leaf in terms else coefficient
    return type(weights[0])(terms, None)
