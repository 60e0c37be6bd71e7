"""Rules that choose one point of a sweep: what WiSE-FT, PAINT and task arithmetic each look at."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

from clipmerge.errors import SelectionError
from clipmerge.search.judge import goodness

Marks = Mapping[str, Any]
"""Split → Mark."""


@dataclass(frozen=True)
class Rule:
    """How a point is chosen.

    Attributes:
        name: as `--rule` and JSON call it. says: the rule in words.
        roles: role → the splits that play it.
        value: the figure that is made as large as possible.
        allows: whether a point may be chosen, given its marks and the base's (the point at 0).
        prefers: which end wins a tie, and under `largest_allowed` wins outright.
    """

    name: str
    says: str
    roles: Mapping[str, tuple[str, ...]]
    value: Callable[[Marks], Fraction] = field(repr=False)
    allows: Callable[[Marks, Marks], bool] | None = field(default=None, repr=False)
    largest_allowed: bool = False

    @property
    def splits(self) -> tuple[str, ...]:
        """Every split that it looks at."""
        return tuple(dict.fromkeys(split for splits in self.roles.values() for split in splits))

    @property
    def needs_base(self) -> bool:
        return self.allows is not None

    def allowed(self, marks: Marks, base: Marks | None) -> bool:
        return self.allows is None or base is None or self.allows(marks, base)

    def rank(self, at: Sequence[float], marks: Marks, base: Marks | None) -> tuple[Any, ...] | None:
        """Larger is better; None where the point is not allowed. Equal figures: the smaller coefficients."""
        if not self.allowed(marks, base):
            return None
        if self.largest_allowed:
            return tuple(at)
        return (self.value(marks), -sum(at), *(-x for x in at))


def best_id(id: str = "id") -> Rule:
    """The best in-distribution score: WiSE-FT where shifts may not be looked at."""
    return Rule("best-id", f"best {id}", {"id": (id,)}, lambda marks: goodness(marks[id]))


def best_mean(id: str = "id", shifts: Sequence[str] = ("shift",)) -> Rule:
    """The best mean of the in-distribution score and the mean over shifts (WiSE-FT)."""
    names = tuple(shifts)
    _some("shift", names)
    return Rule(
        "best-mean",
        f"best mean of {id} and {_mean_of(names)}",
        {"id": (id,), "shift": names},
        lambda marks: (goodness(marks[id]) + _mean(marks, names)) / 2,
    )


def paint(patching: Sequence[str] = ("patch",), supported: Sequence[str] = ("supported",)) -> Rule:
    """The best mean of the supported tasks' mean and the patching tasks' mean (PAINT)."""
    new, old = tuple(patching), tuple(supported)
    _some("patching", new)
    _some("supported", old)
    return Rule(
        "paint",
        f"best mean of {_mean_of(old)} and {_mean_of(new)}",
        {"patching": new, "supported": old},
        lambda marks: (_mean(marks, new) + _mean(marks, old)) / 2,
    )


def normalised_mean(references: Mapping[str, float | Fraction]) -> Rule:
    """The best mean over tasks of score ÷ the score of that task's own finetuned model (task addition).

    Args:
        references: split → the finetuned model's score on it.
    """
    _some("task", tuple(references))
    parts = {split: Fraction(reference) for split, reference in references.items()}
    bad = [split for split, reference in parts.items() if reference <= 0]
    if bad:
        raise SelectionError(
            f"the finetuned model of {_and(bad)} scores 0 there, so nothing can be measured against it",
            hint="check that each finetuned checkpoint has its own data, in the same order",
        )
    return Rule(
        "normalised-mean",
        f"best mean of {_and(tuple(parts))}, each over its finetuned model's",
        {"task": tuple(parts)},
        lambda marks: sum((goodness(marks[s]) / r for s, r in parts.items()), Fraction(0)) / len(parts),
    )


def keep_control(keep: float = 0.95, target: str = "target", control: str = "control") -> Rule:
    """The largest scale whose control score stays at `keep` of the base's or above (negation)."""
    if not 0 <= keep <= 1:
        raise SelectionError(f"keep is a share between 0 and 1, not {keep}")
    share = Fraction(repr(float(keep)))
    return Rule(
        "keep-control",
        f"largest scale that keeps {float(100 * share):g} % of the base's {control}",
        {"target": (target,), "control": (control,)},
        lambda marks: -goodness(marks[target]),
        lambda marks, base: goodness(marks[control]) >= share * goodness(base[control]),
        largest_allowed=True,
    )


def mean_of(splits: Sequence[str]) -> Rule:
    """The best plain mean over splits."""
    names = tuple(splits)
    _some("split", names)
    return Rule("mean", f"best mean of {_and(names)}", {"split": names}, lambda marks: _mean(marks, names))


def _mean(marks: Marks, splits: Sequence[str]) -> Fraction:
    return sum((goodness(marks[split]) for split in splits), Fraction(0)) / len(splits)


def _some(role: str, splits: Sequence[str]) -> None:
    if not splits:
        raise SelectionError(f"the rule needs a {role} split and was given none")


def _mean_of(names: Sequence[str]) -> str:
    return f"mean({', '.join(names)})" if len(names) > 1 else names[0]


def _and(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]
