"""Write one self-contained HTML page of everything that a folder holds: chapters, results, and how files were made."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path

from clipmerge.checkpoint.output import check_target, whole_file
from clipmerge.checkpoint.safetensors import read_header, read_json
from clipmerge.errors import ClipmergeError, OutputError
from clipmerge.report.chapters import Cell, Chapter, Chart, Row, Table, chapters_of, in_order
from clipmerge.text import natural
from clipmerge.weights.provenance import is_original, parents_of
from clipmerge.weights.record import read_record

__all__ = ["report_page"]

MOST_BYTES = 32 << 20
"""Of a JSON file that is read; results of searches over thousands of models stay far below."""
MOST_ROWS = 400
"""Of a table: what is left out is said below it, and stands in the JSON file."""
COLOURS, MARKERS, DASHES = 8, 7, 4
"""How many of each the page's style sheet and `_MARKER` know; as these share no factor, 56 series differ."""

WIDTH, HEIGHT = 420, 300
LEFT, RIGHT, TOP, BOTTOM = 54, 410, 10, 260
"""A chart's viewBox, and the edges of its axes in it."""

_MARKER = (
    "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z", "M-3.6-3.6h7.2v7.2h-7.2z", "M0-4.6L4.4 3.4H-4.4z", "M0-5L5 0L0 5L-5 0z",
    "M0 4.6L4.4-3.4H-4.4z", "M-1.5-5h3v3.5H5v3H1.5V5h-3V1.5H-5v-3h3.5z",
    "M0-5.5L1.6-1.7L5.5-1.5L2.4 1L3.4 4.8L0 2.6L-3.4 4.8L-2.4 1L-5.5-1.5L-1.6-1.7z",
)  # fmt: skip
"""Outlines of circle, square, triangle, diamond, triangle down, plus and star."""


def report_page(
    folder: str | Path,
    out: str | Path | None = None,
    *,
    title: str | None = None,
    force: bool = False,
    on_remark: Callable[[str], None] | None = None,
) -> Path:
    """Write a page of every result below a folder: tables that sort, curves with their values, recipes and digests.

    It reads JSON documents (what results' `to_json` and the commands' `--json` give, and chapters that somebody wrote),
    the records in .safetensors files, and `commands.sh`. The page needs no network, and is the same bytes for the same
    files.

    Args:
        out: the HTML file; by default `report.html` in the folder.
        title: by default the folder's name.
        force: replace the page where it exists.
        on_remark: told of each file that is passed over.

    Raises:
        OutputError: there is no such folder, nothing below it is a result, or the page cannot be written.
    """
    from jinja2 import Environment, StrictUndefined

    folder = Path(folder)
    if not folder.is_dir():
        raise OutputError(f"{folder} is no folder", hint="name the one where results lie")
    target = check_target(folder / "report.html" if out is None else Path(out), force=force)
    chapters = in_order(_documents(folder, on_remark or (lambda _: None)))
    chapters += [chapter for chapter in (_merged_files(folder), _script(folder)) if chapter]
    if not chapters:
        raise OutputError(
            f"nothing below {folder} is a result of clipmerge",
            hint="keep what a command prints with --json: clipmerge soup … --json > soup.json",
        )
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(
        files("clipmerge.report").joinpath("page.html").read_text(encoding="utf-8")
    )
    box = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM}
    helpers = {"draw": draw, "view": _view, "sort_key": _sort_key, "show": _show}
    text = template.render(title=title or folder.resolve().name, chapters=chapters, box=box, **helpers)
    with whole_file(target, force=force) as sibling:
        sibling.write_text(text, encoding="utf-8")
    return target


def _below(folder: Path, pattern: str) -> list[tuple[Path, str]]:
    """Return files below a folder with their names as seen from it, those that lie less deep first."""
    named = [(path, path.relative_to(folder).as_posix()) for path in folder.rglob(pattern) if path.is_file()]
    return sorted(named, key=lambda pair: (pair[1].count("/"), natural(pair[1])))


def _documents(folder: Path, remark: Callable[[str], None]) -> Iterable[Chapter]:
    """Yield the chapters of every JSON file below a folder, in the order of their names."""
    for path, name in _below(folder, "*.json"):
        try:
            document = read_json(path, MOST_BYTES, strict=True)
            if not isinstance(document, Mapping):
                continue
            for chapter in chapters_of(document, name.removesuffix(".json")):
                yield _with_provenance(chapter, folder)
        except ClipmergeError as error:
            remark(f"passed over: {error.message}")


def _merged_files(folder: Path) -> Chapter | None:
    """Return a chapter of the merged files below a folder, with how each was made."""
    known = [
        (name, made) for path, name in _below(folder, "*.safetensors") if (made := _provenance(path, name))
    ]
    if not known:
        return None
    rows = tuple(Row((name, made[0][1]), made) for name, made in known)
    table = Table("Merged files", ("file", "made of"), rows, "Each file carries this record.")
    return Chapter(title="Files", tables=(table,))


def _provenance(path: Path, name: str) -> tuple[tuple[str, str], ...]:
    """Say how a merged file was made: its notation, its parents' digests, how to check it; () of any other file."""
    try:
        record = read_record(read_header(path)[0])
    except ClipmergeError:
        return ()
    if is_original(record):
        return ()
    model = record.get("model")
    return (
        ("notation", str(record.get("notation"))),
        ("written by", f"clipmerge {record.get('version')}"),
        *((("model", str(model.get("name"))),) if isinstance(model, Mapping) else ()),
        *((f"parent {p.name}", f"{p.file or 'in memory'}, {_digest(p.digest)}") for p in parents_of(record)),
        ("check it", f"clipmerge verify {name} --parents ."),
    )


def _with_provenance(chapter: Chapter, folder: Path) -> Chapter:
    """Put behind each row that names a merged file below the folder how that file was made."""

    def more(row: Row) -> Row:
        name = dict(row.details).get("file", "")
        path = folder / name
        if not name.endswith(".safetensors") or ".." in path.parts or not path.is_file():
            return row
        return replace(row, details=(*row.details, *_provenance(path, name)))

    tables = (replace(table, rows=tuple(map(more, table.rows))) for table in chapter.tables)
    return replace(chapter, tables=tuple(tables))


def _digest(digest: str | None) -> str:
    return f"content digest {digest}" if digest else "no digest taken"


def _script(folder: Path) -> Chapter | None:
    path = folder / "commands.sh"
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    except (OSError, UnicodeDecodeError):
        return None
    return Chapter(title="Commands", commands=("\n".join(lines),)) if lines else None


# -- cells -------------------------------------------------------------------------------------------------


def _view(table: Table) -> tuple[Sequence[Row], str, list[bool], bool]:
    """Return what is shown of a table: its rows, the words below, which columns are numbers, whether rows have more."""
    rows, left_out = table.rows[:MOST_ROWS], len(table.rows) - MOST_ROWS
    note = f"The first {MOST_ROWS} of {len(table.rows)} rows." if left_out > 0 else ""
    columns = [[row.cells[i] for row in rows] for i in range(len(table.columns))]
    filled = ([cell for cell in column if cell not in (None, "", "–")] for column in columns)
    numeric = [bool(column) and all(_sort_key(cell) is not None for cell in column) for column in filled]
    return (
        rows,
        " ".join(part for part in (table.note, note) if part),
        numeric,
        any(row.details for row in rows),
    )


def _show(cell: Cell) -> str:
    if cell is None:
        return "–"
    return cell if isinstance(cell, str) else f"{cell:.10g}"


def _sort_key(cell: Cell) -> float | None:
    """Return the number that a cell sorts by, that which its text begins with; None: it sorts as text."""
    if isinstance(cell, str):
        match = re.match(r"[<≤]?\s*([+−-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?)(?![\w.])", cell)
        return float(match.group(1).replace("−", "-")) if match else None
    return cell


# -- charts ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: where, and its text."""

    at: float
    text: str


@dataclass(frozen=True)
class Mark:
    """A point as it is drawn, with what is said of it."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Line:
    """A series as it is drawn: numbers of its colour and dash, the outline of its marker, its path and marks."""

    label: str
    colour: int
    dash: int
    marker: str
    path: str
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Drawing:
    """A chart in the units of its viewBox."""

    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    lines: tuple[Line, ...]
    table: Table


def draw(chart: Chart) -> Drawing:
    """Place a chart's points, axes and labels; its numbers come along as a table."""
    xs = [x for series in chart.series for x, _, _ in series.points]
    ys = [y for series in chart.series for _, y, _ in series.points]
    to_x, x_ticks = _axis(xs, LEFT, RIGHT)
    to_y, y_ticks = _axis(ys, BOTTOM, TOP)
    lines = []
    for number, series in enumerate(chart.series):
        marks = tuple(
            Mark(to_x(x), to_y(y), _words(series.label, x, y, text)) for x, y, text in series.points
        )
        path = "M" + "L".join(f"{mark.x:.1f} {mark.y:.1f}" for mark in marks) if chart.lines and marks else ""
        lines.append(
            Line(series.label, number % COLOURS, number % DASHES, _MARKER[number % MARKERS], path, marks)
        )
    rows = [Row((s.label, round(x, 4), round(y, 4), text)) for s in chart.series for x, y, text in s.points]
    table = Table(
        f"{chart.caption}: the numbers", ("series", chart.x or "x", chart.y or "y", "point"), tuple(rows)
    )
    return Drawing(tuple(x_ticks), tuple(y_ticks), tuple(lines), table)


def _words(label: str, x: float, y: float, text: str) -> str:
    """Say a point: its series, its values and what else is known of it."""
    return f"{label}: {x:.4g}, {y:.4g}" + (f" ({text})" if text not in ("", label) else "")


def _axis(values: Sequence[float], start: float, end: float) -> tuple[Callable[[float], float], list[Tick]]:
    """Return what places a value between start and end, and the ticks there."""
    from matplotlib.ticker import MaxNLocator

    low, high = min(values, default=0.0), max(values, default=1.0)
    room = 0.04 * (high - low) or max(abs(high), 1.0) * 0.04
    low, high = low - room, high + room

    def place(value: float) -> float:
        return start + (value - low) / (high - low) * (end - start)

    ticks = [float(tick) for tick in MaxNLocator(6).tick_values(low, high) if low <= tick <= high]
    return place, [Tick(place(tick), f"{tick:.6g}".replace("-", "−")) for tick in ticks]
