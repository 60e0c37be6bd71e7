"""Lay out result documents as chapters of a page: text, tables and charts, each kind of document by one function."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, TypeAlias

from clipmerge.errors import OutputError

__all__ = ["FORMAT", "Chapter", "Chart", "Row", "Series", "Table", "chapters_of", "read_chapter"]

FORMAT, VERSION = "clipmerge-chapter", 1
"""What a chapter that somebody wrote says that it is."""

Cell: TypeAlias = str | float | None
Document: TypeAlias = Mapping[str, Any]
Point: TypeAlias = tuple[float, float, str]
"""(x, y, what is said of it)."""

_LARGEST = 1e15
"""No score, coefficient or count comes near; beyond it no axis can be drawn."""


@dataclass(frozen=True)
class Row:
    """A row of a table, and what stands behind it: (term, text) each."""

    cells: tuple[Cell, ...]
    details: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Table:
    """A table: as many cells a row as there are columns."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    note: str = ""


@dataclass(frozen=True)
class Series:
    """Points of one label."""

    label: str
    points: tuple[Point, ...]


@dataclass(frozen=True)
class Chart:
    """Lines or points over two axes."""

    caption: str
    x: str
    y: str
    lines: bool
    series: tuple[Series, ...]


@dataclass(frozen=True, kw_only=True)
class Chapter:
    """A chapter of a page; those of a small `order` come first."""

    title: str
    text: tuple[str, ...] = ()
    tables: tuple[Table, ...] = ()
    charts: tuple[Chart, ...] = ()
    commands: tuple[str, ...] = ()
    settings: tuple[tuple[str, str], ...] = ()
    order: float = math.inf


def chapters_of(document: Document, name: str) -> list[Chapter]:
    """Return the chapters of a document of ours, of each result inside it where it holds several; [] of any other.

    Raises:
        OutputError: it says that it is a chapter, or a result, and is none.
    """
    if document.get("format") == FORMAT:
        return [read_chapter(document, name)]
    kind = document.get("kind")
    if isinstance(kind, str) and kind in _LAY_OUT:
        try:
            chapter = _LAY_OUT[kind](document, name)
            _check(chapter)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise OutputError(f"{name} is no complete result of kind {kind}: {error!r}") from error
        return [chapter]
    inside = [
        (key, value) for key, value in document.items() if isinstance(value, Mapping) and "kind" in value
    ]
    return [chapter for key, value in inside for chapter in chapters_of(value, f"{name}: {key}")]


# -- chapters that somebody wrote --------------------------------------------------------------------------


def read_chapter(document: Document, name: str) -> Chapter:
    """Read a chapter document: {"format": "clipmerge-chapter", "version": 1, "title": …, and what there is of order,
    text, tables, charts, commands and settings}.

    Raises:
        OutputError: a part of it has another shape; it is named.
    """

    def need(holds: bool, what: str) -> None:
        if not holds:
            raise OutputError(
                f"{name} is no chapter: {what}", hint='see "A chapter of your own" in merge/README.md'
            )

    def listed(owner: Document, key: str, kind: type | tuple[type, ...]) -> list[Any]:
        found = owner.get(key, [])
        need(
            isinstance(found, list) and all(isinstance(item, kind) for item in found),
            f"{key} is no list of its kind",
        )
        return list(found)

    def text(owner: Document, key: str, otherwise: str | None = "") -> str:
        found = owner.get(key, otherwise)
        need(isinstance(found, str), f"{key} is no text")
        return str(found)

    def row(found: list[Any] | Document, columns: int) -> Row:
        cells = listed(found, "cells", object) if isinstance(found, Mapping) else found
        details = found.get("details", {}) if isinstance(found, Mapping) else {}
        need(len(cells) == columns, f"a row has {len(cells)} cells under {columns} columns")
        need(all(map(_is_cell, cells)), "a cell is no text, number or null")
        need(isinstance(details, Mapping), "a row's details is no object")
        return Row(tuple(cells), tuple((str(key), str(value)) for key, value in details.items()))

    def table(found: Document) -> Table:
        columns = tuple(listed(found, "columns", str))
        rows = [row(one, len(columns)) for one in listed(found, "rows", (list, Mapping))]
        return Table(text(found, "caption"), columns, tuple(rows), text(found, "note"))

    def point(found: list[Any]) -> Point:
        fits = len(found) in (2, 3) and all(_is_number(value) for value in found[:2])
        need(fits and all(isinstance(word, str) for word in found[2:]), "a point is [x, y] or [x, y, text]")
        return found[0], found[1], found[2] if found[2:] else ""

    def chart(found: Document) -> Chart:
        need(found.get("kind", "line") in ("line", "points"), "a chart's kind is line or points")
        series = [
            Series(text(one, "label"), tuple(map(point, listed(one, "points", list))))
            for one in listed(found, "series", Mapping)
        ]
        lines = found.get("kind", "line") == "line"
        return Chart(text(found, "caption"), text(found, "x"), text(found, "y"), lines, tuple(series))

    need(document.get("version") == VERSION, f"its version is {document.get('version')!r}, not {VERSION}")
    order, settings = document.get("order", 0), document.get("settings", {})
    need(_is_number(order), "order is no number")
    need(isinstance(settings, Mapping), "settings is no object")
    return Chapter(
        title=text(document, "title", None),
        text=tuple(listed(document, "text", str)),
        tables=tuple(table(found) for found in listed(document, "tables", Mapping)),
        charts=tuple(chart(found) for found in listed(document, "charts", Mapping)),
        commands=tuple(listed(document, "commands", str)),
        settings=tuple((str(key), str(value)) for key, value in settings.items()),
        order=float(order),
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _LARGEST


def _check(chapter: Chapter) -> None:
    """Refuse what no result holds: cells and points that are neither text nor finite numbers.

    Raises:
        ValueError: there is one.
    """
    cells = (cell for table in chapter.tables for row in table.rows for cell in row.cells)
    points = (
        x for chart in chapter.charts for one in chart.series for point in one.points for x in point[:2]
    )
    if not all(map(_is_cell, cells)) or not all(map(_is_number, points)):
        raise ValueError("a value is no finite number")


def _is_cell(value: object) -> bool:
    return value is None or isinstance(value, str) or _is_number(value)


# -- results of ours ---------------------------------------------------------------------------------------


def _percent(value: Any) -> float | None:
    return None if value is None else round(100 * float(value), 2)


def _scored(scores: Mapping[str, Document]) -> tuple[tuple[str, str], ...]:
    """Return what stands behind a row of scores: each with its 95 % interval and the number of images."""
    told = []
    for split, score in scores.items():
        text = f"{100 * score['value']:.2f} %"
        if score.get("interval"):
            text += ", 95 %: {:.1f}–{:.1f}".format(*(100 * end for end in score["interval"]))
        told.append((split, text + (f", n = {score['n']}" if score.get("n") else "")))
    return tuple(told)


def _sweep(document: Document, name: str) -> Chapter:
    """Lay out a sweep: a row for each point, and every split's curve over the coefficient."""
    steps = document["steps"] if document["kind"] == "patch" else [document]
    tables, charts = [], []
    for number, step in enumerate(steps, 1):
        points, splits = step["history"], list(step["splits"])
        words = list(points[0]["coefficients"])
        title = f"step {number}: " * (len(steps) > 1) + str(step["rule"]["says"])
        rows = []
        for point in points:
            numbers = [float(point["coefficients"][word]) for word in words]
            verdict = "chosen" if point["chosen"] else "" if point["allowed"] else "not allowed"
            values = [_percent(point["scores"][split]["value"]) for split in splits]
            rows.append(Row((*numbers, *values, _percent(point["value"]), verdict), _scored(point["scores"])))
        columns = (*words, *(f"{split}, %" for split in splits), f"{step['rule']['name']}, %", "verdict")
        tables.append(Table(title, columns, tuple(rows)))
        if len(words) == 1:
            charts.append(_curves(step, words[0], splits, title))
    family = document.get("family") or document.get("mode") or document.get("method")
    chosen = ", ".join(f"{key} = {value:g}" for key, value in document["coefficients"].items())
    text = f"{family}: chosen by the rule {document['rule']['name']} ({document['rule']['says']}): {chosen}."
    return Chapter(title=name, text=(text,), tables=tuple(tables), charts=tuple(charts))


def _curves(step: Document, word: str, splits: Sequence[str], title: str) -> Chart:
    """Return every split's score over the only coefficient."""
    points = [(float(point["coefficients"][word]), point) for point in step["history"]]
    points.sort(key=lambda pair: pair[0])
    series = [
        Series(split, tuple(_curve_point(x, word, point, split) for x, point in points)) for split in splits
    ]
    return Chart(title, word, f"{step['metric']}, %", True, tuple(series))


def _curve_point(x: float, word: str, point: Document, split: str) -> Point:
    return (
        x,
        100 * float(point["scores"][split]["value"]),
        f"{word} = {x:g}" + ", chosen" * bool(point["chosen"]),
    )


def _soup(document: Document, name: str) -> Chapter:
    """Lay out a soup or an ensemble: its candidates in the order of their turns, or its coefficients."""
    score = _scored({"held out": document["score"]}) if document.get("score") else ()
    text = tuple(f"{key}: {value}." for key, value in score)
    if document.get("coefficients"):
        shares = _shares(document["coefficients"], str(document["kind"]).replace("_", " "))
        return Chapter(title=name, text=text, tables=(shares,))
    caption = f"{len(document['ingredients'])} of {len(document['candidates'])}"
    if not document["history"]:
        rows = tuple(Row((candidate,)) for candidate in document["candidates"])
        return Chapter(title=name, text=text, tables=(Table(caption, ("checkpoint",), rows),))
    turns, best = [], []
    for step in document["history"]:
        verdict, value = "accepted" if step["accepted"] else "refused", _percent(step["value"])
        reached = f"≤ {100 * step['at_most']:.2f}" if value is None else value
        ends = (verdict, _percent(step["best"]))
        turns.append(Row((step["number"], step["name"], _percent(step["alone"]), reached, *ends)))
        best.append((float(step["number"]), 100 * float(step["best"]), f"{step['name']}, {verdict}"))
    columns = ("turn", "checkpoint", "alone, %", "with it, %", "verdict", "best so far, %")
    chart = Chart(
        "Best score after each turn", "turn", "held-out score, %", True, (Series("best", tuple(best)),)
    )
    return Chapter(title=name, text=text, tables=(Table(caption, columns, tuple(turns)),), charts=(chart,))


def _shares(coefficients: Mapping[str, Any], caption: str) -> Table:
    """Return learned coefficients: by checkpoint, or by group and checkpoint."""
    groups = (
        coefficients if isinstance(next(iter(coefficients.values())), Mapping) else {"share": coefficients}
    )
    names = tuple(next(iter(groups.values())))
    rows = (Row((name, *(round(float(row[name]), 4) for row in groups.values()))) for name in names)
    return Table(caption, ("checkpoint", *groups), tuple(rows))


def _leaderboard(document: Document, name: str) -> Chapter:
    """Lay out a leaderboard: a row for each method, with its expression behind it."""
    tasks, rows = list(document["tasks"]), []
    for entry in document["entries"]:
        values = [_percent(entry["scores"][task]["value"]) for task in tasks]
        ends = (_percent(entry["mean"]), _percent(entry["normalised"]))
        behind = (("notation", str(entry["notation"])),) if entry.get("notation") else ()
        rows.append(
            Row((str(entry["name"]), entry["scale"], *values, *ends), (*behind, *_scored(entry["scores"])))
        )
    where = "on test images, scales chosen on held-out ones"
    if document["reported"] == "val":
        where = "on the held-out images that the scales were chosen on: a little too high"
    columns = ("method", "scale", *(f"{task}, %" for task in tasks), "mean, %", "normalised, %")
    return Chapter(title=name, tables=(Table(where, columns, tuple(rows)),))


def _evaluation(document: Document, name: str) -> Chapter:
    """Lay out scores: a row for each checkpoint, a column for each set of images."""
    data, rows = list(document["data"]), []
    for entry in document["checkpoints"]:
        values = [_percent(entry["scores"][split]["value"]) for split in data]
        total = (_percent(mean(entry["scores"][split]["value"] for split in data)),) if len(data) > 1 else ()
        behind = (("file", str(entry["path"])), ("model", str(entry["model"])), *_scored(entry["scores"]))
        rows.append(Row((str(entry["name"]), *values, *total), behind))
    columns = ("checkpoint", *(f"{split}, %" for split in data), *(("mean, %",) if len(data) > 1 else ()))
    note = "; ".join(f"{split}: {source}" for split, source in document["data"].items())
    return Chapter(
        title=name, tables=(Table(f"{document['metric']} on labelled images", columns, tuple(rows), note),)
    )


def _comparison(document: Document, name: str) -> Chapter:
    """Lay out models against each other on two axes, with the curve between base and finetuned."""
    x, y, labels = document["x"], document["y"], document["labels"]
    series: dict[str, list[tuple[float, float, str]]] = {}
    rows = []
    for row in document["rows"]:
        both, label = row["scores"], str(row.get("name") or row["role"])
        series.setdefault(str(row["role"]), []).append((100 * float(both[x]), 100 * float(both[y]), label))
        rows.append(Row((label, str(row["role"]), _percent(both[x]), _percent(both[y]))))
    title, axes = f"{labels[y]} against {labels[x]}", (f"{labels[x]}, %", f"{labels[y]}, %")
    charts = [
        Chart(title, *axes, False, tuple(Series(role, tuple(points)) for role, points in series.items()))
    ]
    curve = []
    for point in document.get("curve", ()):
        both = point["scores"]
        curve.append((100 * float(both[x]), 100 * float(both[y]), f"α = {point['alpha']:g}"))
    if curve:
        between = f"{title}, from base (α = 0) to finetuned (α = 1)"
        charts.append(Chart(between, *axes, True, (Series("WiSE-FT", tuple(curve)),)))
    table = Table("Accuracy of each model", ("model", "role", *axes), tuple(rows))
    return Chapter(title=name, tables=(table,), charts=tuple(charts))


_LAY_OUT: Mapping[str, Callable[[Document, str], Chapter]] = {
    "sweep": _sweep,
    "coefficients": _sweep,
    "patch": _sweep,
    "uniform_soup": _soup,
    "greedy_soup": _soup,
    "learned_soup": _soup,
    "greedy_ensemble": _soup,
    "adamerging": _soup,
    "leaderboard": _leaderboard,
    "evaluation": _evaluation,
    "comparison": _comparison,
}
"""Kind of document → what lays it out."""


def in_order(chapters: Iterable[Chapter]) -> list[Chapter]:
    """Return chapters as a page shows them: written ones by their order, then results by name."""
    return sorted(chapters, key=lambda chapter: chapter.order)
