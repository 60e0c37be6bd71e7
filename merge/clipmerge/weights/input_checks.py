"""Checkpoints that are taken for what they are not: task vectors that do not say so, a base for its own finetuning."""

from collections.abc import Sequence
from math import ceil
from weakref import WeakKeyDictionary, WeakSet

import numpy as np

from clipmerge.checkpoint.read import Reader
from clipmerge.checkpoint.tensors import Checkpoint, Tensor
from clipmerge.dtypes import ITEMSIZE, storage_dtype, to_float64
from clipmerge.errors import RecipeError
from clipmerge.types import Floats
from clipmerge.weights.digest import Digests, content_digest
from clipmerge.weights.expression import Applied, Expression, applied_in, total_of
from clipmerge.weights.provenance import bases_of
from clipmerge.weights.statistics_files import company_of, statistics_record

TENSORS, ELEMENTS = 32, 16
"""How many matrices of two checkpoints are compared, and how many elements of each: the cosine of unrelated numbers is
then 0 ± 0.05."""
SMALL, APART = 0.5, 0.5
"""A difference has a norm below this share of the other's, and a cosine below this; finetuning leaves both near 1."""

_compared: "WeakKeyDictionary[Checkpoint, WeakSet[Checkpoint]]" = WeakKeyDictionary()


def refuse_bare_vectors(weights: Expression) -> None:
    """Refuse a difference that is taken for a model, by a few samples of its larger tensors.

    Raises:
        RecipeError: a checkpoint is a difference by its norm and its cosine with the base (or the first by name).
    """
    points = [c for c in weights.checkpoints if total_of(c) and statistics_record(c) is None]
    reference = weights.reference if weights.reference in points else points[0] if points else None
    if reference is None:
        return
    known = _compared.setdefault(reference, WeakSet())
    with Reader(points) as reader:
        for other in points:
            if other is not reference and other not in known:
                _compare(reference, other, reader)
                known.add(other)


def refuse_swapped(base: Expression, finetuned: Expression) -> None:
    """Refuse a base that was finetuned from what is given as its finetuning.

    Digests that are remembered are compared; one is taken only where the file's name is the recorded one.

    Raises:
        RecipeError: the record of the base names the other as what its training started from.
    """
    for start in bases_of(base.record):
        for checkpoint in finetuned.checkpoints:
            digests = Digests([checkpoint])
            is_named = checkpoint.path is not None and checkpoint.path.name == start.file
            if (digests.complete or is_named) and digests.finish()[checkpoint] == start.digest:
                first, second = base.reference, checkpoint
                raise RecipeError(
                    f"{first.path or first.name} was finetuned from {second.path or second.name}: "
                    "they stand in each other's place",
                    hint="the base comes first, then what was finetuned from it",
                )


def refuse_foreign_statistics(weights: Expression) -> None:
    """Refuse files of statistics where models are taken, and statistics that were taken of other checkpoints.

    Raises:
        RecipeError: says which file, and of what it is.
    """
    for checkpoint in weights.checkpoints:
        if (record := statistics_record(checkpoint)) is not None:
            raise RecipeError(
                f"{checkpoint.path or checkpoint.name} holds statistics for {record.get('method')}, not a model",
                hint="leave it out: a method finds it beside its checkpoint",
            )
    for applied in (a for a in applied_in(weights.terms) if a.statistics):
        names = {frozenset(file.tensors) for file in applied.statistics}
        for operand, file in zip(applied.operands, applied.statistics, strict=True):
            if (statistics_record(file) or {}).get("of") != content_digest(operand.reference):
                what = f"{file.path or file.name} was taken of another checkpoint than {operand!r}"
                raise RecipeError(f"{what}, or of what it was before", hint="take the statistics again")
        _refuse_apart(applied)
        if len(names) > 1:
            raise RecipeError(
                f"the statistics of {applied.method.name} are of different tensors",
                hint="take those of all checkpoints in the same way (--towers)",
            )


def _refuse_apart(applied: Applied) -> None:
    """Refuse statistics that were taken together with those of other checkpoints, or for other options."""
    records = [statistics_record(file) or {} for file in applied.statistics]
    companies, name = [company_of(record) for record in records], applied.method.name
    if not any(company is not None for company in companies):
        return
    again = f"take them again, of these checkpoints: clipmerge statistics --method {name} CKPT... --data DATA"
    if any(record.get("together") != records[0].get("together") for record in records):
        raise RecipeError(f"the statistics of {name} were not taken together", hint=again)
    if companies[0] != sorted(content_digest(operand.reference) for operand in applied.operands):
        raise RecipeError(f"the statistics of {name} were taken together with other checkpoints", hint=again)
    options = records[0]["together"].get("options")
    for option, value in options.items() if isinstance(options, dict) else ():
        if applied.options.get(option) != value:
            raise RecipeError(
                f"the statistics of {name} were taken for {option}={value}, not {applied.options.get(option)}",
                hint=f"merge with {option}={value}, or take them again with --{option.replace('_', '-')}",
            )


def _compare(reference: Checkpoint, other: Checkpoint, reader: Reader) -> None:
    names = _matrices(reference, other)
    if not names:
        return
    a, b = (
        _sample([checkpoint.tensors[name] for name in names], reader) for checkpoint in (reference, other)
    )
    with np.errstate(all="ignore"):  # zeros, or what is not finite: refused elsewhere
        norms = np.linalg.norm(a), np.linalg.norm(b)
        cosine, share = a @ b / (norms[0] * norms[1]), min(norms) / max(norms)
    if share < SMALL and abs(cosine) < APART:
        small, large = (other, reference) if norms[1] < norms[0] else (reference, other)
        raise RecipeError(
            f"{small.path or small.name} is a difference (a task vector), not a model: its norm is about "
            f"{share:.0%} of {large.path or large.name}'s, their cosine {cosine:.1f}",
            hint="say that it is one: --vectors, vector(NAME) in an expression, load(path, vector=True) in Python",
        )


def _matrices(a: Checkpoint, b: Checkpoint) -> list[str]:
    """Choose matrices that both have, all of one dtype."""
    pairs = {name: (tensor, b.tensors[name]) for name, tensor in a.tensors.items() if name in b.tensors}
    usable = {
        name: tuple(tensor.dtype for tensor in pair)
        for name, pair in pairs.items()
        if len(pair[0].shape) > 1 and pair[0].numel >= ELEMENTS and pair[0].shape == pair[1].shape
        and all(tensor.is_float and tensor.strides is None for tensor in pair)
    }  # fmt: skip
    names = [name for name, dtypes in usable.items() if dtypes == next(iter(usable.values()))]
    return names[:: ceil(len(names) / TENSORS)] if names else []


def _sample(tensors: Sequence[Tensor], reader: Reader) -> Floats:
    """Read a few elements from the middle of each tensor."""
    dtype = tensors[0].dtype
    stored = np.empty((len(tensors), ELEMENTS), storage_dtype(dtype))
    for tensor, row in zip(tensors, stored, strict=True):
        reader.into(tensor, (tensor.numel - ELEMENTS) // 2 * ITEMSIZE[dtype], row.view(np.uint8))
    return to_float64(stored.reshape(-1), dtype)
