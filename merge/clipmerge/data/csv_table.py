"""Read CSV and TSV files of paths with labels, captions or both."""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from clipmerge.data.raw_split import Pick, RawSplit
from clipmerge.data.stored import FileImages
from clipmerge.errors import DataError
from clipmerge.types import Ints

__all__ = ["table"]

_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "path": ("path", "filepath", "file", "filename", "file_name", "image", "image_path", "img", "img_path"),
    "label": ("label", "target", "class", "category", "y", "class_id"),
    "class": ("class_name", "classname", "label_name"),
    "caption": ("caption", "text", "title"),
    "group": ("group", "groups"),
    "split": ("split", "partition", "fold"),
}
_HINT = (
    "the first line names the columns: path, and label or caption or both; maybe class_name, group, split; "
    "without such a line, columns are path and label"
)

Row = dict[str, str]


def table(place: str, pick: Pick) -> RawSplit:
    """Read a .csv or .tsv with a path (relative to its folder) and a label, a caption or both, per line."""
    lines, columns = _lines(place)
    label_columns = [name for name in ("label", "class") if name in columns]
    needed = ("path", label_columns[0] if label_columns else "caption")
    if not set(needed) <= columns:
        raise DataError(f"{place} has no column of paths with one of labels or captions", hint=_HINT)
    unusable = [f"line {n}: no {key}" for n, row in lines.items() for key in needed if not row[key]]
    rows = [row for row in lines.values() if all(row[key] for key in needed)]
    if not rows and not unusable:
        raise DataError(f"{place} lists no images", hint=_HINT)
    group_names = _in_order({row["group"] for row in rows}) if "group" in columns else ()
    labels, classes = _labels(rows, label_columns)
    paths = [row["path"] for row in rows]
    return RawSplit(
        FileImages([str(Path(place).parent / path) for path in paths]),
        _names(paths),
        labels,
        classes,
        [row.get("split", "") for row in rows],
        unusable,
        groups=[group_names.index(row["group"]) for row in rows] if group_names else None,
        group_names=group_names or None,
        captions=[row["caption"] for row in rows] if "caption" in columns else None,
    )


def _lines(place: str) -> tuple[dict[int, Row], set[str]]:
    """Return number of line → its cells by our own names of columns, and which of those names there are."""
    try:
        with Path(place).open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            tabs = place.lower().endswith(".tsv") or ("\t" in first and "," not in first)
            reader = csv.reader(file, delimiter="\t" if tabs else ",")
            lines = dict[int, list[str]]()
            for cells in reader:
                lines[reader.line_num] = [cell.strip() for cell in cells]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{place} cannot be read as a table: {error}", hint=_HINT) from error
    header = [cell.lower() for cell in next(iter(lines.values()), [])]
    ours = [next((name for name, theirs in _COLUMNS.items() if cell in theirs), "") for cell in header]
    if "path" not in ours and len(header) in (2, 3) and Path(header[0]).suffix:
        ours = ["path", "label", "group"][: len(header)]
    elif lines:
        del lines[min(lines)]
    names = set(ours) - {""}
    empty = dict.fromkeys(names, "")
    rows = {n: empty | dict(zip(ours, cells, strict=False)) for n, cells in lines.items() if any(cells)}
    return rows, names


def _labels(
    rows: Sequence[Row], columns: Sequence[str]
) -> tuple[Sequence[str] | Ints | None, tuple[str, ...] | None]:
    """Return labels and classes: words; or numbers, with names where a column gives them."""
    if not columns:
        return None, None
    words = [row[columns[0]] for row in rows]
    if columns[0] == "label" and all(word.lstrip("-").isdecimal() for word in words):
        numbers = np.array(list(map(int, words)), np.int64)
        names = {int(row["label"]): row["class"] for row in rows} if len(columns) == 2 else {}
        return numbers, tuple(names.get(i, str(i)) for i in range(max(names) + 1)) if names else None
    return words, _in_order(set(words))


def _in_order(words: set[str]) -> tuple[str, ...]:
    """Return words sorted; as numbers where all of them are."""
    return tuple(sorted(words, key=int if all(w.isdecimal() for w in words) else None))


def _names(paths: Sequence[str]) -> list[str]:
    """Return paths as written; what absolute ones have in common is cut off, so that they are the same elsewhere."""
    absolute = [Path(path).parent for path in paths if Path(path).is_absolute()]
    common = Path(os.path.commonpath(absolute)) if absolute else Path()
    return [(p.relative_to(common) if p.is_absolute() else p).as_posix() for p in map(Path, paths)]
