"""Do these checkpoints fit together? Answered from headers, before a byte of tensor is read, all at once."""

from collections.abc import Sequence

from clipmerge.checkpoint.tensors import Checkpoint, Tensor
from clipmerge.errors import MismatchError, RecipeError
from clipmerge.text import nearest
from clipmerge.weights.names import TOWERS, matches
from clipmerge.weights.weights import Weights

SHOWN = 10
"""Problems listed in full; the rest are counted."""


def check(weights: Weights, *, dtype: str | None = None) -> None:
    """Refuse an expression whose total, names, shapes or dtypes make no sense.

    Args:
        dtype: the output's float dtype where the user chose one.

    Raises:
        RecipeError: the total is neither 0 nor 1, or a pattern matches no tensor.
        MismatchError: names, shapes or dtypes differ between checkpoints; all of them are listed.
    """
    checkpoints = weights.checkpoints
    if checkpoints:
        reference = reference_of(weights)
        problems = [p for other in checkpoints if other is not reference for p in _compare(reference, other)]
        if not problems and weights.base is None and dtype is None:
            problems = _float_dtypes(checkpoints)
        if problems:
            raise MismatchError(listed(problems), hint=_hint(problems))
        _check_patterns(weights, weights.names)
    weights.kind()
    weights.model  # noqa: B018 - raises where two models are mixed


def reference_of(weights: Weights) -> Checkpoint:
    """The checkpoint whose names and dtypes count: the base, or of a method's result the first operand's."""
    if isinstance(weights.base, Checkpoint):
        return weights.base
    if weights.base is not None:
        return reference_of(weights.base.operands[0])
    return min(weights.checkpoints, key=lambda checkpoint: (checkpoint.name, str(checkpoint.path)))


def listed(problems: Sequence[str]) -> str:
    """Up to ten problems, one a line, and how many more there are."""
    shown = list(problems[:SHOWN])
    if len(problems) > SHOWN:
        shown.append(f"… and {len(problems) - SHOWN} more")
    return "the checkpoints do not fit together:\n  " + "\n  ".join(shown)


def _compare(reference: Checkpoint, other: Checkpoint) -> list[str]:
    mine, theirs = reference.tensors, other.tensors
    where = str(other.path or other.name)
    problems = []
    for name in sorted(mine.keys() - theirs.keys()):
        close = nearest(name, theirs.keys() - mine.keys())
        problems.append(f"{where} lacks {name!r}" + (f" (it has {close!r})" if close else ""))
    for name in sorted(theirs.keys() - mine.keys()):
        problems.append(f"{where} has {name!r}, which {reference.path or reference.name} lacks")
    for name in sorted(mine.keys() & theirs.keys()):
        problems += _differences(name, mine[name], theirs[name], str(reference.path or reference.name), where)
    return problems


def _differences(name: str, mine: Tensor, theirs: Tensor, here: str, there: str) -> list[str]:
    if mine.shape != theirs.shape:
        return [f"{name!r} is {list(mine.shape)} in {here} and {list(theirs.shape)} in {there}"]
    if mine.dtype != theirs.dtype and not (mine.is_float and theirs.is_float):
        return [f"{name!r} is {mine.dtype} in {here} and {theirs.dtype} in {there}"]
    return []


def _float_dtypes(checkpoints: Sequence[Checkpoint]) -> list[str]:
    problems = []
    for name, tensor in checkpoints[0].tensors.items():
        for other in checkpoints[1:]:
            theirs = other.tensors[name]
            if tensor.dtype != theirs.dtype:
                here, there = checkpoints[0].path or checkpoints[0].name, other.path or other.name
                problems.append(f"{name!r} is {tensor.dtype} in {here} and {theirs.dtype} in {there}")
                break
    return problems


def _hint(problems: Sequence[str]) -> str:
    if all(" is F" in p or " is BF16" in p for p in problems):
        return "a mean has no base to take the dtype from; choose one: --dtype fp32"
    if any("'classification_head" in p for p in problems):
        return "a trained head is merged like any tensor: every checkpoint must have it, or none"
    return "all checkpoints must come from one architecture; `clipmerge inspect FILE` shows what each holds"


def _check_patterns(weights: Weights, names: Sequence[str]) -> None:
    for leaf, coefficient in weights.terms.items():
        for pattern in coefficient.patterns:
            if not any(matches(pattern, name) for name in names):
                close = nearest(pattern, names if "." in pattern else (*TOWERS, *names))
                raise RecipeError(
                    f"the pattern {pattern!r} matches no tensor",
                    hint=f"did you mean {close!r}?"
                    if close
                    else "patterns are globs over names, such as 'visual.*'",
                )
        for operand in () if isinstance(leaf, Checkpoint) else leaf.operands:
            _check_patterns(operand, names)
