"""What an adapter finds, and which part of a source is meant."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from clipmerge.data.check import Bad
from clipmerge.data.images import Images
from clipmerge.errors import DataError
from clipmerge.text import nearest

_SAME = (
    ("train", "training"),
    ("val", "valid", "validation", "dev", "holdout"),
    ("test", "testing", "eval"),
)
_PARTS = re.compile(rf"({'|'.join(name for names in _SAME for name in names)})([-_].*)?")

Pick = Callable[[Sequence[str]], str]
"""From the names of the parts that a source has to the one to take; raises where that is not among them."""


@dataclass(frozen=True, slots=True)
class Found:
    """What an adapter found: items of one part, as the source has them.

    Attributes:
        labels: indices (an array), words, or None where there are only captions.
        classes: names by index, or the words in their order; None where the source does not say.
        elsewhere: labels that other parts of the source have: a class that only they have is not empty.
        empty: classes that the source has a place for but no image.
        bad: items that the source names but does not describe well enough to use.
    """

    images: Images
    names: Sequence[str]
    labels: npt.NDArray[np.int64] | Sequence[str] | None
    classes: tuple[str, ...] | None = None
    elsewhere: Iterable[Any] = ()
    empty: tuple[str, ...] = ()
    bad: tuple[Bad, ...] = ()
    groups: Sequence[int] | npt.NDArray[np.int64] | None = None
    group_names: tuple[str, ...] | None = None
    captions: Sequence[str] | None = None
    templates: tuple[str, ...] | None = None


def is_part(name: str) -> bool:
    """Whether a folder of this name is a part of a source: "train", "val", "test_blurred" …"""
    return _PARTS.fullmatch(name) is not None


def pick_part(place: str, parts: Sequence[str], part: str | None, role: str) -> str:
    """The one of `parts` that `part` names, or, where it is None, the one for the role.

    A source without parts is `[""]`. A single part suits every role. Validation images stand in for test
    images where there are none, never the other way round.

    Raises:
        DataError: there is none; the hint lists those there are.
    """
    if part is None and len(parts) == 1:
        return parts[0]
    wanted = part or role
    same: tuple[str, ...] = next((names for names in _SAME if wanted in names), ())
    instead: tuple[str, ...] = _SAME[1] if part is None and wanted == "test" else ()
    for name in (wanted, *same, *instead):
        if name in parts:
            return name
    listed = ", ".join(f"#{name}" for name in parts if name)
    if not listed:
        raise DataError(f"{place} has no splits, so there is no #{part}", hint=f"leave #{part} out")
    if part is not None:
        close = nearest(part, parts)
        guess = f"; did you mean #{close}?" if close else ""
        raise DataError(f"{place} has no split {part!r}", hint=f"its splits: {listed}{guess}")
    hold = (
        f", or hold some out: {place}#train with --holdout 2%" if role == "val" and "train" in parts else ""
    )
    raise DataError(f"{place} has no {role} split", hint=f"name one of its splits: {listed}{hold}")
