"""Read CSV and TSV files of paths with labels, captions or both."""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from clipmerge.data.raw_split import Pick, RawSplit
from clipmerge.data.stored import FileImages
from clipmerge.data.survey import Unusable
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
    all_rows, columns = _rows(place)
    if "path" not in columns or not columns & {"label", "class", "caption"}:
        raise DataError(f"{place} has no column of paths with one of labels or captions", hint=_HINT)
    label_columns = sorted(columns & {"label", "class"}, reverse=True)
    needed = ["path", label_columns[0] if label_columns else "caption"]
    unusable = [
        Unusable(f"line {row['line']}", f"no {key}") for row in all_rows for key in needed if not row[key]
    ]
    all_rows = [row for row in all_rows if all(row[key] for key in needed)]
    if "split" in columns:
        part = pick(list(dict.fromkeys(row["split"] for row in all_rows)))
        rows = [row for row in all_rows if row["split"] == part]
    else:
        pick([""])
        rows = all_rows
    if not rows and not unusable:
        raise DataError(f"{place} lists no images", hint=_HINT)
    group_names = _in_order({row["group"] for row in all_rows}) if "group" in columns else ()
    labels, classes = _labels(rows, all_rows, label_columns)
    return RawSplit(
        FileImages([str(Path(place).parent / row["path"]) for row in rows]),
        _names([row["path"] for row in rows], [row["path"] for row in all_rows]),
        labels,
        classes,
        all_labels=[row[label_columns[0]] for row in all_rows] if label_columns else (),
        unusable=tuple(unusable),
        groups=[group_names.index(row["group"]) for row in rows] if group_names else None,
        group_names=group_names or None,
        captions=[row["caption"] for row in rows] if "caption" in columns else None,
    )


def _rows(place: str) -> tuple[list[Row], set[str]]:
    """Return the lines as dictionaries by our own names of columns, and which of those there are."""
    try:
        with Path(place).open(encoding="utf-8-sig", newline="") as file:
            first = file.readline()
            file.seek(0)
            tabs = place.lower().endswith(".tsv") or ("\t" in first and "," not in first)
            lines = list(csv.reader(file, delimiter="\t" if tabs else ","))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{place} cannot be read as a table: {error}", hint=_HINT) from error
    header = [cell.strip().lower() for cell in lines[0]] if lines else []
    ours = [next((name for name, theirs in _COLUMNS.items() if cell in theirs), "") for cell in header]
    body, start = lines[1:], 2
    if "path" not in ours and len(header) in (2, 3) and Path(header[0]).suffix:
        ours, body, start = ["path", "label", "group"][: len(header)], lines, 1
    names = {name for name in ours if name}
    rows = []
    for number, cells in enumerate(body, start):
        if any(cell.strip() for cell in cells):
            row = dict.fromkeys(names, "") | {"line": str(number)}
            row |= {name: cell.strip() for name, cell in zip(ours, cells, strict=False) if name}
            rows.append(row)
    return rows, names


def _labels(
    rows: Sequence[Row], all_rows: Sequence[Row], columns: Sequence[str]
) -> tuple[Sequence[str] | Ints | None, tuple[str, ...] | None]:
    """Return labels and classes: words; or numbers, with names where a column gives them."""
    if not columns:
        return None, None
    key = columns[0]
    if key == "label" and all(row["label"].lstrip("-").isdecimal() for row in all_rows):
        numbers = np.array([int(row["label"]) for row in rows], np.int64)
        if len(columns) == 1:
            return numbers, None
        names = {int(row["label"]): row["class"] for row in all_rows}
        return numbers, tuple(names.get(i, str(i)) for i in range(max(names) + 1))
    return [row[key] for row in rows], _in_order({row[key] for row in all_rows})


def _in_order(words: set[str]) -> tuple[str, ...]:
    """Return words sorted; as numbers where all of them are."""
    return tuple(sorted(words, key=int if all(w.isdecimal() for w in words) else None))


def _names(paths: Sequence[str], all_paths: Sequence[str]) -> list[str]:
    """Return paths as written; what absolute ones have in common is cut off, so that they are the same elsewhere."""
    absolute = [Path(path).parent for path in all_paths if Path(path).is_absolute()]
    common = Path(os.path.commonpath(absolute)) if absolute else Path()
    return [(p.relative_to(common) if p.is_absolute() else p).as_posix() for p in map(Path, paths)]
