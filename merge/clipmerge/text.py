"""Words that messages share: suggestions for a mistyped name, lists that are cut, and the order of names."""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from difflib import get_close_matches

__all__ = ["and_more", "did_you_mean", "natural", "nearest", "numbered_twins"]


def natural(text: str) -> tuple[list[str | int], str]:
    """Return a key that sorts the numbers in texts as numbers: "class_2" comes before "class_10"."""
    parts = re.split(r"([0-9]+)", text)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], text


def numbered_twins(names: Iterable[str]) -> tuple[str, ...]:
    """Return names of which none occurs twice: the second "a.jpg" is "a.jpg (2)"."""
    seen: Counter[str] = Counter()
    unique = []
    for name in names:
        seen[name] += 1
        unique.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return tuple(unique)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name closest to `name`, or None where nothing is close."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return close[0] if close else None


def did_you_mean(name: str, known: Iterable[str], otherwise: str | None = None) -> str | None:
    """Return "did you mean X?" for the known name closest to `name`; `otherwise` where nothing is close."""
    close = nearest(name, known)
    return otherwise if close is None else f"did you mean {close}?"


def and_more(items: Sequence[str], limit: int = 8, separator: str = ", ") -> str:
    """Join the first `limit` items and say how many are left out: "a, b … and 3 more"."""
    shown = separator.join(items[:limit])
    left_out = len(items) - limit
    if left_out <= 0:
        return shown
    return f"{shown}{separator if separator.startswith(chr(10)) else ' '}… and {left_out} more"
