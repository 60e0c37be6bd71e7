"""Results as pictures: one literal table from a result's kind to the function that draws it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clipmerge.errors import SelectionError
from clipmerge.report import compare, curves, progress
from clipmerge.report.style import targets

Document = Mapping[str, Any]

_DRAW: Mapping[str, Callable[[Document, str | Path], None]] = {
    "sweep": curves.sweep,
    "patch": curves.patch,
    "greedy_soup": progress.soup,
    "greedy_ensemble": progress.soup,
    "learned_soup": progress.coefficients,
    "coefficients": progress.search,
    "comparison": compare.comparison,
}


def plot(document: Document, path: str | Path) -> list[Path]:
    """Draw a result's `to_json()` document.

    Args:
        document: with its "kind" ("sweep", "patch", "greedy_soup" …).
        path: the figure; PNG and SVG are both written, whichever suffix it has.

    Returns:
        The files written.
    """
    kind = str(document.get("kind"))
    if kind not in _DRAW:
        raise SelectionError(f"there is no picture of {kind}", hint=f"there is one of {', '.join(_DRAW)}")
    _DRAW[kind](document, path)
    return targets(path)


def training(events: Sequence[Document], path: str | Path) -> list[Path]:
    """Draw a finetuning's log: loss, learning rate and held-out scores against steps."""
    progress.training(events, path)
    return targets(path)
