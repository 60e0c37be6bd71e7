"""What a search hands back, as plain tables and JSON; the report room draws it."""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

Cell = str


@dataclass(frozen=True)
class Table:
    """Text cells under headers."""

    headers: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    title: str = ""


def percent(value: float | None, digits: int = 2) -> Cell:
    """0.8125 as 81.25; a dash for None."""
    return "–" if value is None else f"{100 * value:.{digits}f}"


def span(interval: Sequence[float] | None) -> Cell:
    """A 95 % interval as 78.1–84.0."""
    return "–" if interval is None else f"{100 * interval[0]:.1f}–{100 * interval[1]:.1f}"


def chance(p: float | None) -> Cell:
    """A p value, with small ones as a bound."""
    if p is None:
        return "–"
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def plot(document: dict[str, Any], path: str | Path) -> list[Path]:
    """Draw a result's document; the files that were written."""
    figures = import_module("clipmerge.report.figures")
    drawn: list[Path] = figures.plot(document, Path(path))
    return drawn
