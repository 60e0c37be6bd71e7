"""Do these checkpoints fit together? Answered from headers, before a byte of tensor is read, all at once."""

from collections.abc import Iterable, Iterator, Sequence

from clipmerge.checkpoint.tensors import Checkpoint
from clipmerge.errors import MismatchError, RecipeError
from clipmerge.text import and_more, did_you_mean, nearest
from clipmerge.weights.expression import Applied, Expression, checkpoints_of
from clipmerge.weights.names import PARTS, POSITIONS, TOWERS, absent_parts, matches

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
        problems = problems or _towers_lacking(weights)
        if not problems and weights.base is None and dtype is None:
            problems = _different_dtypes(checkpoints)
        if problems:
            shown = _odd_ones(checkpoints) if len(problems) > SHOWN else []
            raise MismatchError(
                "the checkpoints do not fit together:\n  " + and_more(shown or problems, SHOWN, "\n  "),
                hint=_hint(problems),
            )
        _check_patterns(weights, sorted({name for checkpoint in checkpoints for name in checkpoint.tensors}))
    weights.kind()


def left_alone(weights: Expression) -> list[str]:
    """Say which towers and heads some checkpoints lack, and where these are taken from; a sentence for each lack."""
    names, lacking = set(weights.names), dict[tuple[str, ...], list[str]]()
    adapters = sorted(c.name for c in weights.checkpoints if c.factors is not None)
    over = and_more(sorted(c.name for c in weights.checkpoints if not c.is_sparse)) or "nothing"
    sources: dict[tuple[str, ...], str] = {}
    for checkpoint in weights.checkpoints:
        if checkpoint.is_sparse:
            continue
        if parts := absent_parts(missing := names - checkpoint.tensors.keys(), names):
            lacking.setdefault(parts, []).append(checkpoint.name)
            first = min(missing)
            used = (
                c for leaf, value in weights.terms.items() if value.at(first) for c in checkpoints_of(leaf)
            )
            sources[parts] = and_more(sorted({c.name for c in used if first in c.tensors})) or "nothing"
    kind = "is a LoRA adapter" if len(adapters) == 1 else "are LoRA adapters"
    told = [f"{and_more(adapters)} {kind} over {over}"] if adapters else []
    return told + [
        f"{and_more(sorted(those))} {'has' if len(those) == 1 else 'have'} {_no(parts)}: kept as in {sources[parts]}"
        for parts, those in lacking.items()
    ]


def missing_names(missing: Sequence[str], otherwise: Sequence[str]) -> list[str]:
    """Quote each name of `missing`, with the nearest of the names that are there instead."""
    hints = [(name, nearest(name, otherwise)) for name in sorted(missing)]
    return [f"{name!r}" + (f" (it has {close!r})" if close else "") for name, close in hints]


def _odd_ones(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """Name the few checkpoints of another architecture than most; none where it is not clear who is at odds."""
    kinds: dict[frozenset[object], list[Checkpoint]] = {}
    for checkpoint in checkpoints:
        tensors = frozenset((name, t.shape) for name, t in checkpoint.tensors.items())
        kinds.setdefault(tensors, []).append(checkpoint)
    *few, most = sorted(kinds.values(), key=len)
    if len(most) < 2 or any(len(odd) == len(most) for odd in few):
        return []
    count, shapes = len(most[0].tensors), "as many, of other shapes"
    return [
        f"{odd.path or odd.name} has {len(odd.tensors)} tensors, the other {len(most)} have "
        f"{count if count != len(odd.tensors) else shapes}: it is another architecture"
        for odds in few
        for odd in odds
    ]


def _misfits(reference: Checkpoint, other: Checkpoint) -> list[str]:
    mine, theirs = reference.tensors, other.tensors
    here, there = str(reference.path or reference.name), str(other.path or other.name)
    missing, extra = list(mine.keys() - theirs.keys()), sorted(theirs.keys() - mine.keys())
    if other.is_sparse:  # zero where it has no tensor
        missing = []
    if reference.is_sparse:
        extra = []
    whole_parts = all(absent_parts(set(n), mine.keys() | theirs.keys()) for n in (missing, extra) if n)
    if whole_parts:  # towers and heads that only one has: see `_towers_lacking`
        missing, extra = [], []
    problems = [f"{there} lacks {name}" for name in missing_names(missing, extra)]
    problems += [f"{there} has {name!r}, which {here} lacks" for name in extra]
    for name in sorted(mine.keys() & theirs.keys()):
        a, b = mine[name], theirs[name]
        if a.shape != b.shape:
            problems.append(f"{name!r} is {list(a.shape)} in {here} and {list(b.shape)} in {there}")
        elif a.dtype != b.dtype and not (a.is_float and b.is_float):
            problems.append(f"{name!r} is {a.dtype} in {here} and {b.dtype} in {there}")
    return problems


def _towers_lacking(weights: Expression) -> list[str]:
    """Name the checkpoints that are used where they have no tensor: a model must be whole, a vector need not."""
    used: dict[Checkpoint, set[str]] = {}
    first, *others = weights.checkpoints
    if all(other.tensors.keys() == first.tensors.keys() for other in others):
        return []
    for checkpoint, name in _used_but_missing(weights, weights.names):
        used.setdefault(checkpoint, set()).add(name)
    problems = []
    for checkpoint, names in used.items():
        parts = absent_parts(names, names | checkpoint.tensors.keys())
        lack = f"has {_no(parts)}" if parts else f"lacks {and_more([repr(name) for name in sorted(names)])}"
        problems.append(f"{checkpoint.path or checkpoint.name} {lack}")
    return problems


def _used_but_missing(weights: Expression, names: Iterable[str]) -> Iterator[tuple[Checkpoint, str]]:
    for leaf, coefficient in weights.terms.items():
        needed = [name for name in names if coefficient.at(name)]
        if isinstance(leaf, Checkpoint):
            missing = [name for name in needed if name not in leaf.tensors]
            yield from ((leaf, name) for name in missing if not leaf.is_sparse)
        for operand in leaf.operands if isinstance(leaf, Applied) else ():
            yield from _used_but_missing(operand, needed)


def _no(parts: Sequence[str]) -> str:
    """Write `no image projection, text tower or logit scale`."""
    *others, last = [PARTS[part] for part in parts]
    return f"no {', '.join(others)} or {last}" if others else f"no {last}"


def _different_dtypes(checkpoints: Sequence[Checkpoint]) -> list[str]:
    first, *others = [checkpoint for checkpoint in checkpoints if not checkpoint.is_sparse] or checkpoints
    problems = []
    for name, tensor in first.tensors.items():
        for other in [c for c in others if name in c.tensors and c.tensors[name].dtype != tensor.dtype][:1]:
            here, there = first.path or first.name, other.path or other.name
            problems.append(
                f"{name!r} is {tensor.dtype} in {here} and {other.tensors[name].dtype} in {there}"
            )
    return problems


def _hint(problems: Sequence[str]) -> str:
    if all(any(f"{name!r} is [" in problem for name in POSITIONS) for problem in problems):
        return (
            "their image sizes (or context lengths) differ, and nothing else: --resize-positions brings positional "
            "embeddings to the base's grid, in Python resize_positions(weights, base)"
        )
    if all(" is F" in p or " is BF16" in p for p in problems):
        return "a mean has no base to take the dtype from; choose one: --dtype fp32"
    if any("'classification_head" in p or p.endswith("no classification head") for p in problems):
        return "a trained head is merged like any tensor: every checkpoint must have it, or none"
    if any(" has no " in p for p in problems):
        return "a model must be whole, a difference need not: base + 0.4*(encoder - base), with a whole base"
    return "all checkpoints must come from one architecture; `clipmerge inspect FILE` shows what each holds"


def _check_patterns(weights: Expression, names: Sequence[str]) -> None:
    for leaf, coefficient in weights.terms.items():
        for pattern in coefficient.patterns:
            if not any(matches(pattern, name) for name in names):
                known = names if "." in pattern else (*TOWERS, *names)
                otherwise = "patterns are globs over names, such as 'visual.*'"
                hint = did_you_mean(pattern, known, otherwise)
                raise RecipeError(f"the pattern {pattern!r} matches no tensor", hint=hint)
        for operand in leaf.inputs if isinstance(leaf, Applied) else ():
            _check_patterns(operand, names)
