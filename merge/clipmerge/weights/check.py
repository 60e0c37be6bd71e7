"""Do these checkpoints fit together? Answered from headers, before a byte of tensor is read, all at once."""

from collections.abc import Sequence

from clipmerge.checkpoint.tensors import Checkpoint
from clipmerge.errors import MismatchError, RecipeError
from clipmerge.text import and_more, did_you_mean, nearest
from clipmerge.weights.expression import Applied, Expression
from clipmerge.weights.names import TOWERS, matches

SHOWN = 10
"""Problems listed in full; the rest are counted."""


def check(weights: Expression, *, dtype: str | None = None) -> None:
    """Refuse an expression whose total, names, shapes or dtypes make no sense.

    Args:
        dtype: the output's float dtype where the user chose one.

    Raises:
        RecipeError: the total is neither 0 nor 1, or a pattern matches no tensor.
        MismatchError: names, shapes or dtypes differ between checkpoints; all of them are listed.
    """
    checkpoints = weights.checkpoints
    if checkpoints:
        reference = weights.reference
        problems = [p for other in checkpoints if other is not reference for p in _misfits(reference, other)]
        if not problems and weights.base is None and dtype is None:
            problems = _different_dtypes(checkpoints)
        if problems:
            raise MismatchError(
                "the checkpoints do not fit together:\n  " + and_more(problems, SHOWN, "\n  "),
                hint=_hint(problems),
            )
        _check_patterns(weights, weights.names)
    weights.kind()
    weights.model  # noqa: B018 - raises where two models are mixed


def missing_names(missing: Sequence[str], otherwise: Sequence[str]) -> list[str]:
    """Quote each name of `missing`, with the nearest of the names that are there instead."""
    hints = [(name, nearest(name, otherwise)) for name in sorted(missing)]
    return [f"{name!r}" + (f" (it has {close!r})" if close else "") for name, close in hints]


def _misfits(reference: Checkpoint, other: Checkpoint) -> list[str]:
    mine, theirs = reference.tensors, other.tensors
    here, there = str(reference.path or reference.name), str(other.path or other.name)
    missing, extra = list(mine.keys() - theirs.keys()), sorted(theirs.keys() - mine.keys())
    problems = [f"{there} lacks {name}" for name in missing_names(missing, extra)]
    problems += [f"{there} has {name!r}, which {here} lacks" for name in extra]
    for name in sorted(mine.keys() & theirs.keys()):
        a, b = mine[name], theirs[name]
        if a.shape != b.shape:
            problems.append(f"{name!r} is {list(a.shape)} in {here} and {list(b.shape)} in {there}")
        elif a.dtype != b.dtype and not (a.is_float and b.is_float):
            problems.append(f"{name!r} is {a.dtype} in {here} and {b.dtype} in {there}")
    return problems


def _different_dtypes(checkpoints: Sequence[Checkpoint]) -> list[str]:
    first, *others = checkpoints
    problems = []
    for name, tensor in first.tensors.items():
        for other in [c for c in others if c.tensors[name].dtype != tensor.dtype][:1]:
            here, there = first.path or first.name, other.path or other.name
            problems.append(
                f"{name!r} is {tensor.dtype} in {here} and {other.tensors[name].dtype} in {there}"
            )
    return problems


def _hint(problems: Sequence[str]) -> str:
    if all(" is F" in p or " is BF16" in p for p in problems):
        return "a mean has no base to take the dtype from; choose one: --dtype fp32"
    if any("'classification_head" in p for p in problems):
        return "a trained head is merged like any tensor: every checkpoint must have it, or none"
    return "all checkpoints must come from one architecture; `clipmerge inspect FILE` shows what each holds"


def _check_patterns(weights: Expression, names: Sequence[str]) -> None:
    for leaf, coefficient in weights.terms.items():
        for pattern in coefficient.patterns:
            if not any(matches(pattern, name) for name in names):
                known = names if "." in pattern else (*TOWERS, *names)
                otherwise = "patterns are globs over names, such as 'visual.*'"
                hint = did_you_mean(pattern, known, otherwise)
                raise RecipeError(f"the pattern {pattern!r} matches no tensor", hint=hint)
        for operand in leaf.operands if isinstance(leaf, Applied) else ():
            _check_patterns(operand, names)
