"""A look at task vectors before they are merged: how long they are, where they agree, what would spoil the merge."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipmerge.checkpoint.read import Reader
from clipmerge.errors import RecipeError
from clipmerge.types import Progress, Reals
from clipmerge.weights.blocks import default_threads
from clipmerge.weights.expression import Applied
from clipmerge.weights.look import group_names
from clipmerge.weights.measure import Model
from clipmerge.weights.methods import METHODS
from clipmerge.weights.plan import Step, make_plan
from clipmerge.weights.weights import Weights, as_weights

ZEROS = 0.10
"""Share of exact zeros from which a task vector was probably rounded: of a finetuning of 1e-4 read from fp16 files 9 %
are 0, from bf16 files 41 %."""
LONGER = 3.0
"""How many times the median norm a task vector may have: methods of singular values follow the longest."""

Matrix = list[list[float | None]]


@dataclass(frozen=True, slots=True)
class Agreement:
    """One part of the model; `tower` is None for all of it.

    Attributes:
        norms: of each task vector.
        cosines: between each two, None where one is zero.
        conflicts: of each two, the share of opposite signs among entries that neither leaves alone.
    """

    tower: str | None
    block: int | None
    tensors: int
    norms: list[float]
    cosines: Matrix
    conflicts: Matrix


@dataclass(frozen=True, slots=True)
class TaskVectors:
    """See `compare_tasks`.

    Attributes:
        zeros: of each task, the share of exact zeros in the tensors that it changed.
        warnings: what would spoil a merge, each in a sentence.
    """

    tasks: tuple[str, ...]
    zeros: tuple[float, ...]
    parts: tuple[Agreement, ...]
    whole: Agreement
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """JSON-ready, all fields."""
        return {"kind": "task_vectors", **asdict(self)}


@dataclass(slots=True)
class _Sums:
    """What adds up over stretches: inner products, opposite and common non-zero entries of each two, exact zeros."""

    inner: npt.NDArray[np.float64]
    opposite: npt.NDArray[np.float64]
    common: npt.NDArray[np.float64]
    zeros: npt.NDArray[np.float64]

    def __iadd__(self, other: "_Sums") -> "_Sums":
        for name in self.__slots__:
            getattr(self, name).__iadd__(getattr(other, name))
        return self


def compare_tasks(
    base: str | Path | Weights,
    models: Sequence[str | Path | Weights],
    *,
    on_progress: Progress | None = None,
) -> TaskVectors:
    """Measure the task vectors of models finetuned from one base: norms, cosines and sign conflicts by tower and block.

    Warns where more than a tenth of a vector is exactly 0 (files in bf16), and where one is so much longer than the
    others that methods of singular values would follow it alone.

    Args:
        models: finetuned models, or task vectors.

    Raises:
        RecipeError: fewer than two models.
        MismatchError: names or shapes differ.
    """
    if len(models) < 2:
        raise RecipeError("task vectors are compared with each other", hint="give two models or more")
    start, tuned = as_weights(base), [as_weights(model) for model in models]
    vectors = [weights - start if weights.kind() == 1 else weights for weights in tuned]
    applied = Applied(METHODS["magmax"], tuple(vectors), {})
    plan = make_plan(start + Weights.of(applied))
    by_name: dict[str, _Sums] = {}
    with Reader(plan.checkpoints) as reader, np.errstate(all="ignore"):
        model = Model(applied, plan, reader, {}, default_threads(), on_progress)
        for name, sums in model.map_steps(_sums):
            if name in by_name:
                by_name[name] += sums
            else:
                by_name[name] = sums
        reader.unchanged()
    parts = [
        _agreement(tower, block, [by_name[name] for name in names])
        for (tower, block), names in group_names(by_name).items()
    ]
    whole, sizes = (
        _agreement(None, None, list(by_name.values())),
        {s.name: s.numel for s in plan.steps.values()},
    )
    zeros = []
    for i in range(len(vectors)):
        changed = [name for name, sums in by_name.items() if sums.inner[i, i] > 0]
        total = sum(sizes[name] for name in changed)
        zeros.append(sum(by_name[name].zeros[i] for name in changed) / total if total else 0.0)
    tasks = tuple(w.checkpoints[-1].name for w in tuned)
    return TaskVectors(tasks, tuple(zeros), tuple(parts), whole, tuple(_warnings(tasks, whole.norms, zeros)))


def _sums(step: Step, vectors: list[Reals]) -> tuple[str, _Sums]:
    stacked = np.stack(vectors)
    wide, signs = stacked.astype(np.float64), np.sign(stacked).astype(np.float32)
    held = np.abs(signs)
    common = (held @ held.T).astype(np.float64)
    agree = (signs @ signs.T).astype(np.float64)  # as many as agree, less as many as do not
    zeros = np.count_nonzero(stacked == 0, axis=1).astype(np.float64)
    return step.name, _Sums(wide @ wide.T, (common - agree) / 2, common, zeros)


def _agreement(tower: str | None, block: int | None, parts: Sequence[_Sums]) -> Agreement:
    inner, opposite, common = (sum(getattr(p, key) for p in parts) for key in ("inner", "opposite", "common"))
    norms = np.sqrt(np.diag(inner))
    cosines = _ratios(inner, np.outer(norms, norms))
    return Agreement(tower, block, len(parts), norms.tolist(), cosines, _ratios(opposite, common))


def _ratios(over: npt.NDArray[np.float64], under: npt.NDArray[np.float64]) -> Matrix:
    return [
        [float(a / b) if b > 0 else None for a, b in zip(*rows, strict=True)]
        for rows in zip(over, under, strict=True)
    ]


def _warnings(tasks: Sequence[str], norms: Sequence[float], zeros: Sequence[float]) -> list[str]:
    """Say what would spoil a merge of these vectors."""
    found = [
        f"{share:.0%} of what {task} changed is exactly 0: its file, or the base's, was rounded (bf16?), and so is "
        "what is merged; merge the float32 files"
        for task, share in zip(tasks, zeros, strict=True)
        if share > ZEROS
    ]
    median = float(np.median(norms))
    for task, norm in zip(tasks, norms, strict=True):
        if norm == 0:
            found.append(f"{task} is the base: its task vector is zero")
        elif norm > LONGER * median > 0:
            found.append(
                f"the task vector of {task} is {norm / median:.1f} times as long as the median: tsv, iso_c, gram and "
                "the like would follow it alone; scale them alike first: equalise=True, or --equalise"
            )
    return found


def summary_rows(found: TaskVectors) -> list[tuple[str, int, Mapping[str, float | None]]]:
    """Return, for each part and all of the model: its name, tensors, and over pairs the mean, least and largest cosine
    and the mean share of conflicts."""
    rows: list[tuple[str, int, Mapping[str, float | None]]] = []
    for part in (*found.parts, found.whole):
        count = len(found.tasks)
        pairs = [(i, j) for i in range(count) for j in range(i)]
        cosines = [c for i, j in pairs if (c := part.cosines[i][j]) is not None]
        conflicts = [c for i, j in pairs if (c := part.conflicts[i][j]) is not None]
        where = part.tower or "all"
        name = where if part.block is None else f"{where}.block[{part.block}]"
        facts = {
            "cosine": sum(cosines) / len(cosines) if cosines else None,
            "least": min(cosines, default=None),
            "largest": max(cosines, default=None),
            "conflicts": sum(conflicts) / len(conflicts) if conflicts else None,
        }
        rows.append((name, part.tensors, facts))
    return rows
