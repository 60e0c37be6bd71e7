"""What methods need to know of the whole model before the first tensor is merged: thresholds, norms, equal operands."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt

from clipmerge.checkpoint.read import Reader
from clipmerge.ops.decompose import CUT
from clipmerge.ops.order import count_of, kth_largest_of_stream
from clipmerge.ops.vectors import crumb_ranks, elect, equal_factors, majority_of, total
from clipmerge.types import Progress, Reals
from clipmerge.weights import blocks
from clipmerge.weights.applied import Facts, Measured, evaluate, operands_of
from clipmerge.weights.blocks import Buffers, default_threads, in_threads
from clipmerge.weights.expression import Applied, Leaf, applied_in
from clipmerge.weights.names import depths_of
from clipmerge.weights.plan import Plan, Step
from clipmerge.weights.reading import Read, ReadStretch, ReadWhole, uses_in

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

SAMPLED = 1 << 10
"""Elements at the beginning of each piece that a sample looks at."""
SAME = 1e-4
"""Operands whose difference is smaller than this share of them are one: copies, but for rounding."""


class Model:
    """A method's operands over all float tensors, in stretches.

    Attributes:
        tasks: how many operands there are. size: the elements of one. names: of its tensors.
    """

    def __init__(
        self,
        applied: Applied,
        plan: Plan,
        reader: Reader,
        facts: Facts,
        threads: int,
        on_progress: Progress | None = None,
    ) -> None:
        self._applied, self._reader, self._facts = applied, reader, facts
        self._threads, self._on_progress = threads, on_progress
        self._steps = [step for step in plan.steps.values() if step.kind == "sum" and step.numel]
        self._uses = uses_in([applied])
        self.names = [step.name for step in self._steps]
        self.size = sum(step.numel for step in self._steps)

    @property
    def has_merged(self) -> bool:
        return self._applied.merged is not None

    @property
    def tasks(self) -> int:
        groups = self._facts[self._applied].groups
        return len(self._applied.operands if groups is None else groups)

    def map(
        self, function: Callable[[list[Reals]], T], sampled: bool = False, *, threads: int | None = None
    ) -> list[T]:
        """Call the function with a stretch of every operand (and of `merged`, last), all stretches in their order.

        Args:
            sampled: a sample of every stretch only.
        """
        return self.map_steps(lambda _, arrays: function(arrays), sampled, threads=threads)

    def map_steps(
        self,
        function: Callable[[Step, list[Reals]], T],
        sampled: bool = False,
        *,
        threads: int | None = None,
    ) -> list[T]:
        """`map` a function that takes the step of the stretch's tensor too."""
        jobs = [job for step in self._steps for job in self._jobs(step, sampled)]
        results: dict[int, T] = {}
        lock, done = Lock(), 0

        def work(number: int, job: tuple[Step, int, int, bool], buffers: Buffers) -> Iterator[None]:
            nonlocal done
            results[number] = function(job[0], self._arrays(*job, buffers))
            if self._on_progress and not sampled:
                with lock:
                    done += job[2] - job[1]
                    self._on_progress("measuring", done, self.size)
            yield

        tasks = (partial(work, number, job) for number, job in enumerate(jobs))
        in_threads(tasks, self._threads if threads is None else threads)
        return [results[number] for number in range(len(jobs))]

    def _jobs(self, step: Step, sampled: bool) -> Iterator[tuple[Step, int, int, bool]]:
        """Yield (step, first element, past the last, whether the tensor is needed whole)."""
        strided = any(c.tensors[step.name].strides is not None for c in step.checkpoints)
        if strided or not all(operand.streams for operand in self._applied.inputs):
            yield step, 0, step.numel, True
            return
        for low in range(0, step.numel, blocks.BLOCK):
            high = min(low + blocks.BLOCK, step.numel)
            yield step, low, min(high, low + SAMPLED) if sampled else high, False

    def _arrays(self, step: Step, low: int, high: int, whole: bool, buffers: Buffers) -> list[Reals]:
        # Numbers that are not finite are looked for when the tensors are merged: here they harm nothing.
        if whole:
            read: Read = ReadWhole(self._reader, step.name, self._uses)
            shape = step.shape
        else:
            memory = buffers.scratch, buffers.pool
            read = ReadStretch(self._reader, step.name, low, high, self._uses, *memory)
            shape = (high - low,)
        arrays = operands_of(self._applied, step.name, shape, read, self._facts)
        if self._applied.merged is not None:
            arrays.append(evaluate(self._applied.merged, step.name, shape, read, self._facts))
        return [array.reshape(-1) for array in arrays]


def measure(
    plan: Plan,
    reader: Reader,
    *,
    leaves: Iterable[Leaf] | None = None,
    threads: int | None = None,
    gpu: "torch.device | None" = None,
    on_progress: Progress | None = None,
) -> dict[Applied, Measured]:
    """Find what the methods of a plan need to know of the whole model, inner methods first.

    Args:
        leaves: those among which the methods are; by default the plan's.
        gpu: where their matrices are decomposed; None: here.
    """
    facts: dict[Applied, Measured] = {}
    if leaves is None:
        leaves = dict.fromkeys(leaf for step in plan.steps.values() for _, leaf in step.terms)
    for applied in dict.fromkeys(inner for leaf in leaves for inner in applied_in([leaf])):
        facts[applied] = Measured()
        model = Model(applied, plan, reader, facts, threads or default_threads(), on_progress)
        method, options = applied.method, applied.options
        if method.distinct and len(applied.operands) > 1:
            facts[applied] = replace(facts[applied], groups=_groups(model))
        if options.get("equalise"):
            facts[applied] = replace(facts[applied], factors=equal_factors(_norms(model)))
        if method.measure:
            facts[applied] = replace(facts[applied], arguments=method.measure(model, **options))
        facts[applied] = replace(facts[applied], gpu=gpu)  # what was measured was measured here
    return facts


def _groups(model: Model) -> list[list[int]] | None:
    """Say which operands are copies of each other, None where none is: by a sample, then by all their elements."""
    for sampled in (True, False):
        inner = sum(model.map(lambda arrays: _inner(arrays[: model.tasks]), sampled))
        norms = np.diag(inner)
        with np.errstate(invalid="ignore"):  # what is not finite is refused when the tensors are merged
            apart = norms[:, None] + norms[None] - 2 * inner
        same = (apart <= SAME**2 * norms) & (norms > CUT**2 * norms.max(initial=0.0))
        groups: list[list[int]] = []
        for i in range(len(norms)):
            group = next((group for group in groups if same[i, group[0]]), None)
            if group is None:
                groups.append([i])
            else:
                group.append(i)
        if len(groups) == len(norms):
            return None
    return groups


def _inner(arrays: Sequence[Reals]) -> npt.NDArray[np.float64]:
    """Return all inner products of a stretch of vectors."""
    stacked = np.stack(arrays).astype(np.float64, copy=False)
    return stacked @ stacked.T


def _norms(model: Model) -> list[float]:
    """Return the norm of each operand over the whole model."""
    squares = model.map(lambda arrays: [np.vdot(a.astype(np.float64), a) for a in arrays[: model.tasks]])
    return [float(np.sqrt(sum(of_task))) for of_task in zip(*squares, strict=True)]


def ties(model: Model, *, density: float, scope: str, **_: Any) -> Mapping[str, Any]:
    """Find each vector's threshold over the whole model; the sum of elected signs is found when it is asked for."""
    if scope == "tensor":
        return {}
    ranks = [[count_of(model.size, density)]] * model.tasks
    thresholds = [rank for (rank,) in kth_largest_of_stream(model.map, ranks, model.size)]
    lock, known = Lock(), list[float]()

    def majority() -> float:
        # Only needed where kept entries cancel exactly, which is rare: an extra pass then, by the first who asks.
        with lock:
            if not known:
                signs = model.map(lambda vectors: majority_of(*elect(vectors, thresholds)[:2]), threads=1)
                known.append(sum(signs))
            return known[0]

    return {"thresholds": thresholds, "majority": majority}


def breadcrumbs(model: Model, *, beta: float, gamma: float, scope: str, **_: Any) -> Mapping[str, Any]:
    """Find each vector's largest and smallest magnitude that stays, over the whole model."""
    if scope == "tensor":
        return {}
    ranks = [list(crumb_ranks(model.size, beta, gamma))] * model.tasks
    return {"thresholds": kth_largest_of_stream(model.map, ranks, model.size)}


def lines(model: Model, *, alpha: float | None, **_: Any) -> Mapping[str, Any]:
    """Find the first block's factor by the sum's and the merged vector's 1-norms, and how deep each tensor lies."""
    facts: dict[str, Any] = {"depths": depths_of(model.names)}
    if alpha is None and model.has_merged:
        lengths = np.sum(model.map(lambda a: [_length(total(*a[:-1])), _length(a[-1])]), axis=0)
        facts["alpha"] = float(lengths[0] / lengths[1]) / model.tasks if lengths[1] else 1 / model.tasks
    return facts


def _length(array: Reals) -> float:
    return float(np.abs(array).sum(dtype=np.float64))


def equalise(model: Model, **_: Any) -> Mapping[str, Any]:
    """Find what scales each vector to the median of their norms."""
    return {"factors": equal_factors(_norms(model))}
