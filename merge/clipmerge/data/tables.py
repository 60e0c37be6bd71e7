"""CSV and TSV of paths with labels, captions or both."""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from clipmerge.data.check import Bad
from clipmerge.data.found import Found, Pick
from clipmerge.data.images import InFiles
from clipmerge.errors import DataError

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


def table(place: str, pick: Pick) -> Found:
    """A .csv or .tsv with a path (relative to its folder) and a label, a caption or both, per line."""
    rows, columns = _rows(place)
    if "path" not in columns or not columns & {"label", "class", "caption"}:
        raise DataError(f"{place} has no column of paths with one of labels or captions", hint=_HINT)
    labelled = sorted(columns & {"label", "class"}, reverse=True)
    needed = ["path", labelled[0] if labelled else "caption"]
    bad = [Bad(f"line {row['line']}", f"no {key}") for row in rows for key in needed if not row[key]]
    rows = [row for row in rows if all(row[key] for key in needed)]
    everywhere = rows
    if "split" in columns:
        part = pick(list(dict.fromkeys(row["split"] for row in rows)))
        rows = [row for row in rows if row["split"] == part]
    else:
        pick([""])
    if not rows and not bad:
        raise DataError(f"{place} lists no images", hint=_HINT)
    groups = [row["group"] for row in rows] if "group" in columns else None
    group_names = None if groups is None else _in_order({row["group"] for row in everywhere})
    root = Path(place).parent
    return Found(
        InFiles([root / row["path"] for row in rows]),
        _names([row["path"] for row in rows], [row["path"] for row in everywhere]),
        *_labels(rows, everywhere, labelled),
        elsewhere=[row[labelled[0]] for row in everywhere] if labelled else (),
        bad=tuple(bad),
        groups=None if groups is None or group_names is None else [group_names.index(g) for g in groups],
        group_names=group_names,
        captions=[row["caption"] for row in rows] if "caption" in columns else None,
    )


def _rows(place: str) -> tuple[list[Row], set[str]]:
    """The lines as dictionaries by our own names of columns, and which of those there are."""
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
    rows: Sequence[Row], everywhere: Sequence[Row], labelled: Sequence[str]
) -> tuple[Sequence[str] | np.ndarray[tuple[int], np.dtype[np.int64]] | None, tuple[str, ...] | None]:
    """Labels and classes: words; or numbers, with names where a column gives them."""
    if not labelled:
        return None, None
    key = labelled[0]
    if key == "label" and all(row["label"].lstrip("-").isdecimal() for row in everywhere):
        numbers = np.array([int(row["label"]) for row in rows], np.int64)
        if len(labelled) == 1:
            return numbers, None
        named = {int(row["label"]): row["class"] for row in everywhere}
        return numbers, tuple(named.get(i, str(i)) for i in range(max(named) + 1))
    return [row[key] for row in rows], _in_order({row[key] for row in everywhere})


def _in_order(words: set[str]) -> tuple[str, ...]:
    """Sorted; as numbers where all of them are."""
    return tuple(sorted(words, key=int if all(w.isdecimal() for w in words) else None))


def _names(paths: Sequence[str], everywhere: Sequence[str]) -> list[str]:
    """Paths as written; what absolute ones have in common is cut off, so that they are the same elsewhere."""
    absolute = [Path(path).parent for path in everywhere if Path(path).is_absolute()]
    common = Path(os.path.commonpath(absolute)) if absolute else Path()
    return [(p.relative_to(common) if p.is_absolute() else p).as_posix() for p in map(Path, paths)]
