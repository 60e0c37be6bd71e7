"""Rules that choose one point of a sweep: what WiSE-FT, PAINT and task arithmetic each look at."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol, TypeVar

from clipmerge.errors import SelectionError
from clipmerge.evaluate.score import Score

Scores = Mapping[str, Score]
"""Split → score."""


class Scored(Protocol):
    """A point as a rule sees it: its coefficients, its figure, and whether it may be chosen."""

    @property
    def coefficients(self) -> Mapping[str, Fraction]: ...
    @property
    def value(self) -> Fraction: ...
    @property
    def allowed(self) -> bool: ...


P = TypeVar("P", bound=Scored)


@dataclass(frozen=True)
class Rule:
    """How a point is chosen.

    Attributes:
        name: as `--rule` and JSON call it. says: the rule in words.
        roles: role → the splits that play it.
        value: the figure that is made as large as possible.
        allows: whether a point may be chosen, given its scores and the base's (the point at 0).
        largest_allowed: choose the largest coefficient that is allowed, whatever its figure.
        within: choose the smallest coefficient whose figure is at most so far below the best one.
    """

    name: str
    says: str
    roles: Mapping[str, tuple[str, ...]]
    value: Callable[[Scores], Fraction] = field(repr=False)
    allows: Callable[[Scores, Scores], bool] | None = field(default=None, repr=False)
    largest_allowed: bool = False
    within: Fraction | None = None

    @property
    def splits(self) -> tuple[str, ...]:
        """Every split that it looks at."""
        return tuple(dict.fromkeys(split for splits in self.roles.values() for split in splits))

    @property
    def needs_base(self) -> bool:
        return self.allows is not None

    def allowed(self, scores: Scores, base: Scores | None) -> bool:
        """Decide whether a point may be chosen; without the base's scores every point may."""
        return self.allows is None or base is None or self.allows(scores, base)

    def best(self, points: Iterable[P]) -> P:
        """Return the point to choose. Equal figures: the smaller coefficients.

        Raises:
            SelectionError: none is allowed.
        """
        allowed = [point for point in points if point.allowed]
        if not allowed:
            raise SelectionError(f"nothing that was tried fits the rule {self.name}: {self.says}")
        if self.largest_allowed:
            return max(allowed, key=lambda point: tuple(point.coefficients.values()))
        if self.within is not None:
            allowed = [point for point in allowed if point.value >= self.border(allowed)]
            return min(allowed, key=_size)
        return min(allowed, key=lambda point: (-point.value, *_size(point)))

    def border(self, points: Iterable[Scored]) -> Fraction:
        """Return the lowest figure that `within` lets be chosen among these points."""
        return max(point.value for point in points) - (self.within or 0)

    def to_json(self) -> dict[str, Any]:
        """Return name, words and roles, ready for `json.dumps`."""
        roles = {role: list(splits) for role, splits in self.roles.items()}
        return {"name": self.name, "says": self.says, "roles": roles}


def best_id(id: str = "id") -> Rule:
    """Choose the best in-distribution score: WiSE-FT where shifts may not be looked at."""
    return Rule("best-id", f"best {id}", {"id": (id,)}, lambda scores: scores[id].figure)


def within(points: float | Fraction = 1, id: str = "id") -> Rule:
    """Choose the smallest coefficient whose in-distribution score is within so many points of the best one.

    It needs no data of a shift. On 18 published WiSE-FT curves it loses 0.5 points against the best mean over the
    shifts and 0.6 in distribution; the best in-distribution score loses 1.7 and 0.
    """
    lost = _points("within", points)
    says = f"smallest within {float(points):g} point{'s' * (points != 1)} of the best {id}"
    return Rule("within", says, {"id": (id,)}, lambda scores: scores[id].figure, within=lost)


def best_mean(id: str = "id", shifts: Sequence[str] = ("shift",)) -> Rule:
    """Choose the best mean of the in-distribution score and the mean over shifts (WiSE-FT)."""
    names = _not_empty("shift", shifts)
    return Rule(
        "best-mean",
        f"best mean of {id} and {_mean_text(names)}",
        {"id": (id,), "shift": names},
        lambda scores: (scores[id].figure + _mean(scores, names)) / 2,
    )


def paint(
    patching: Sequence[str] = ("patch",),
    supported: Sequence[str] = ("supported",),
    *,
    keep: float | Fraction | None = None,
) -> Rule:
    """Choose the best mean of the supported tasks' mean and the patching tasks' mean (PAINT).

    Args:
        keep: only among coefficients whose mean over supported tasks is at most so many points below the base's.
    """
    new, old = _not_empty("patching", patching), _not_empty("supported", supported)
    says, allows = f"best mean of {_mean_text(old)} and {_mean_text(new)}", None
    if keep is not None:
        says += f" that costs {_mean_text(old)} {float(keep):g} points at most"
        allows = _keeps(old, lost=_points("keep", keep))
    return Rule(
        "paint",
        says,
        {"patching": new, "supported": old},
        lambda scores: (_mean(scores, new) + _mean(scores, old)) / 2,
        allows,
    )


def normalised_mean(references: Mapping[str, float | Fraction]) -> Rule:
    """Choose the best mean over tasks of score ÷ the score of that task's own finetuned model (task addition).

    Args:
        references: split → the finetuned model's score on it.
    """
    names = _not_empty("task", tuple(references))
    parts = {split: Fraction(reference) for split, reference in references.items()}
    zero = [split for split, reference in parts.items() if reference <= 0]
    if zero:
        raise SelectionError(
            f"the finetuned model of {_and(zero)} scores 0 there, so nothing can be measured against it",
            hint="check that each finetuned checkpoint has its own data, in the same order",
        )
    return Rule(
        "normalised-mean",
        f"best mean of {_and(names)}, each over its finetuned model's",
        {"task": names},
        lambda scores: sum((scores[s].figure / r for s, r in parts.items()), Fraction(0)) / len(parts),
    )


def keep_control(keep: float = 0.95, target: str = "target", control: str = "control") -> Rule:
    """Choose the largest scale whose control score stays at `keep` of the base's or above (negation)."""
    if not 0 <= keep <= 1:
        raise SelectionError(f"keep is a share between 0 and 1, not {keep}")
    share = Fraction(repr(float(keep)))
    return Rule(
        "keep-control",
        f"largest scale that keeps {float(100 * share):g} % of the base's {control}",
        {"target": (target,), "control": (control,)},
        lambda scores: -scores[target].figure,
        _keeps((control,), share=share),
        largest_allowed=True,
    )


def mean_of(splits: Sequence[str]) -> Rule:
    """Choose the best plain mean over splits."""
    names = _not_empty("split", splits)
    return Rule("mean", f"best mean of {_and(names)}", {"split": names}, lambda scores: _mean(scores, names))


def _keeps(
    splits: tuple[str, ...], *, share: Fraction = Fraction(1), lost: Fraction = Fraction(0)
) -> Callable[[Scores, Scores], bool]:
    """Return what allows a mean over splits of at least this share of the base's, less what may be lost of it."""
    return lambda scores, base: _mean(scores, splits) >= share * _mean(base, splits) - lost


def _points(what: str, points: float | Fraction) -> Fraction:
    """Return points of a hundred as a share, exactly."""
    number = points if isinstance(points, Fraction) else Fraction(repr(points))
    if not 0 <= number <= 100:
        raise SelectionError(f"{what} is a number of points between 0 and 100, not {points}")
    return number / 100


def _size(point: Scored) -> tuple[Fraction, ...]:
    """Return what orders points by their coefficients, smaller first."""
    numbers = tuple(point.coefficients.values())
    return (sum(numbers, Fraction(0)), *numbers)


def _mean(scores: Scores, splits: Sequence[str]) -> Fraction:
    return sum((scores[split].figure for split in splits), Fraction(0)) / len(splits)


def _not_empty(role: str, splits: Sequence[str]) -> tuple[str, ...]:
    if not splits:
        raise SelectionError(f"the rule needs a {role} split and was given none")
    return tuple(splits)


def _mean_text(names: Sequence[str]) -> str:
    return f"mean({', '.join(names)})" if len(names) > 1 else names[0]


def _and(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]
