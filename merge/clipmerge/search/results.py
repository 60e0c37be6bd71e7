"""What a search hands back, as plain tables and JSON; the report room draws it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

Cell = str

MOST_COLUMNS = 6
_MOST_ROWS = 40


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


def step_headers(metric: str) -> tuple[str, ...]:
    """Over the rows of a greedy search; p compares top-1 answers, whatever the metric."""
    p = "p" if metric == "top1" else "p (top-1)"
    return ("", "checkpoint", "alone", "with it", "95 %", p, "", "best")


def shares_table(coefficients: Mapping[str, Any], temperature: float | None) -> Table:
    """A learned soup's shares: all of them where they fit on a screen, else their range over the groups."""
    title = "learned soup" if temperature is None else f"learned soup; logits times {temperature:.4g}"
    rows = list(coefficients.values())
    if not isinstance(rows[0], Mapping):
        pairs = tuple((name, f"{share:.4f}") for name, share in coefficients.items())
        return Table(("checkpoint", "share"), pairs, title)
    names = tuple(rows[0])
    if len(names) <= MOST_COLUMNS and len(rows) <= _MOST_ROWS:
        cells = tuple((group, *(f"{row[n]:.4f}" for n in names)) for group, row in coefficients.items())
        return Table(("group", *names), cells, title)
    shares = {name: [row[name] for row in rows] for name in names}
    ranges = tuple(
        (name, *(f"{x:.4f}" for x in (sum(s) / len(s), min(s), max(s)))) for name, s in shares.items()
    )
    return Table(("checkpoint", "mean share", "lowest", "highest"), ranges, f"{title}; {len(rows)} groups")


def plot(document: dict[str, Any], path: str | Path) -> list[Path]:
    """Draw a result's document; the files that were written."""
    figures = import_module("clipmerge.report.figures")
    drawn: list[Path] = figures.plot(document, Path(path))
    return drawn
