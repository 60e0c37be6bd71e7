"""Read tables of paths with labels, captions or both: CSV and TSV files, and WILDS' metadata.csv."""

import csv
import io
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath

from clipmerge.data.raw_split import Pick, RawSplit
from clipmerge.data.stored import FileImages
from clipmerge.errors import DataError
from clipmerge.text import natural

__all__ = ["CAPTION", "is_table", "table"]

CAPTION = re.compile(r"(caption|text|title|sentence|comment)s?[_ -]?[0-9]*")
"""What columns of captions are called; several are several captions of one image."""

_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "path": (
        "path", "filepath", "file", "filename", "file_name", "image", "image_path", "img", "img_path", "img_filename",
        "image_name",
    ),
    "label": ("label", "target", "y", "class_id", "label_id"),
    "class": ("class_name", "classname", "label_name", "class", "category"),
    "group": ("group", "groups"),
    "split": ("split", "partition", "fold"),
}  # fmt: skip
_HINT = (
    "the first line names the columns: path, and label or caption or both; maybe class_name, group, split; "
    "without such a line, columns are path and label"
)
_DELIMITERS = (",", "\t", ";", "|")
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]")
_NOTHING = ("", "nan", "NaN")
"""What tables have where there is no label: pandas' missing values too."""
_PARTS = {"0": "train", "1": "val", "2": "test"}
"""Numbers of splits, as WILDS writes them."""

Row = dict[str, str]


def table(place: str, pick: Pick) -> RawSplit:
    """Read a table with a path (relative to its folder) and a label, captions or both, per line.

    Its text is UTF-8 or Latin-1, its columns stand apart by commas, tabs, semicolons or bars. A folder stands for the
    metadata.csv in it.
    """
    file = Path(place) / "metadata.csv" if Path(place).is_dir() else Path(place)
    lines, columns, remarks = _lines(file)
    label_column = next((name for name in ("label", "class") if name in columns), None)
    caption_columns = sorted((name for name in columns if name.startswith("caption")), key=natural)
    if "path" not in columns or not (label_column or caption_columns):
        raise DataError(f"{place} has no column of paths with one of labels or captions", hint=_HINT)
    unusable = list[str]()
    for number, row in list(lines.items()):
        missing = "path" if not row["path"] else ""
        if not missing and label_column is not None and row[label_column] in _NOTHING:
            missing = label_column
        if not missing and label_column is None and not any(row[name] for name in caption_columns):
            missing = "caption"
        if missing:
            unusable.append(f"line {number}: no {missing}")
            del lines[number]
    rows = list(lines.values())
    if not rows and not unusable:
        raise DataError(f"{place} lists no images", hint=_HINT)
    if len(caption_columns) > 1 and label_column is not None:
        remarks.append(f"images have labels, so of their captions only {caption_columns[0]} is kept")
    named = [
        (row, row[name] if name else "")
        for row in rows
        for name in (caption_columns if label_column is None else caption_columns[:1] or [""])
        if label_column is not None or row[name]
    ]
    labels, classes = _labels(file, [row for row, _ in named], columns) if label_column else (None, None)
    paths, how = _here([row["path"] for row, _ in named], file.parent)
    image = {path: i for i, path in enumerate(dict.fromkeys(paths))}
    groups = [row["group"] for row, _ in named] if "group" in columns else []
    group_names = sorted(set(groups), key=natural)
    parts = [row.get("split", "") for row, _ in named]
    return RawSplit(
        FileImages([str(file.parent / path) for path in image]),
        _names(paths),
        labels,
        classes,
        [_PARTS[part] for part in parts] if set(parts) <= _PARTS.keys() else parts,
        unusable,
        groups=[group_names.index(group) for group in groups] if groups else None,
        group_names=tuple(group_names) or None,
        captions=[caption for _, caption in named] if caption_columns else None,
        which=[image[path] for path in paths],
        remarks=[*remarks, *how],
    )


def is_table(file: Path) -> bool:
    """Return whether a file's first line has columns of paths and of labels or captions."""
    try:
        _, columns, _ = _lines(file, most=1)
    except DataError:
        return False
    return "path" in columns and len(columns - {"group", "split"}) > 1


def _lines(file: Path, most: int | None = None) -> tuple[dict[int, Row], set[str], list[str]]:
    """Return number of line → its cells by our own names of columns; which of those there are; and remarks."""
    text, remarks = _text(file)
    first, _, rest = text.partition("\n")
    told = re.fullmatch(r"sep=(.)\r?", first)  # Excel's own line
    text = rest if told else text
    delimiter = (
        told[1] if told else _delimiter(text.partition("\n")[0].strip("\r"), file.suffix.lower() == ".tsv")
    )
    lines = dict[int, list[str]]()
    try:
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        for cells in reader:
            lines[reader.line_num + bool(told)] = [cell.strip() for cell in cells]
            if most is not None and len(lines) > most:
                break
    except csv.Error as error:
        raise DataError(f"{file} cannot be read as a table: {error}", hint=_HINT) from error
    header = next(iter(lines.values()), [])
    known = next((wilds for wilds in _WILDS if wilds.columns <= set(header)), None)
    if known is not None:
        cells_by_line = {
            n: dict(zip(header, cells, strict=False)) for n, cells in lines.items() if any(cells)
        }
        del cells_by_line[min(lines)]
        names = known.names(file.parent)
        rows = {
            n: known.row(cells, names) for n, cells in cells_by_line.items() if known.columns <= cells.keys()
        }
        short = len(cells_by_line) - len(rows)
        remarks += [f"read as {known.name} of WILDS"] + (
            [f"passed over {short} lines that end early"] if short else []
        )
        return rows, {"path", "label", "class", "group", "split"}, remarks
    ours = _our_columns(header)
    if "path" not in ours and len(header) in (2, 3) and Path(header[0]).suffix:
        ours = ["path", "label", "group"][: len(header)]
    elif lines:
        del lines[min(lines)]
    there = set(ours) - {""}
    empty = dict.fromkeys(there, "")
    rows = {
        n: empty | {name: cell for name, cell in zip(ours, cells, strict=False) if name}
        for n, cells in lines.items()
        if any(cells)
    }
    return rows, there, remarks


def _text(file: Path) -> tuple[str, list[str]]:
    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read as a table: {error}", hint=_HINT) from error
    if b"\0" in data:
        raise DataError(f"{file} cannot be read as a table: it is no text", hint=_HINT)
    for encoding in ("utf-8-sig", "cp1252", "latin-1"):
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError:
            continue
        text = text.replace("\r\n", "\n").replace("\r", "\n")  # an old Mac's lines end in \r alone
        return text, [] if encoding == "utf-8-sig" else ["it is not UTF-8, so it was read as Latin-1"]
    raise AssertionError("Latin-1 reads any bytes")


def _delimiter(first: str, tabs: bool) -> str:
    """Return what stands between columns: what gives most columns that we know, else a path with a label."""

    def fits(delimiter: str) -> tuple[int, bool, bool]:
        cells = next(csv.reader([first], delimiter=delimiter), [])
        paths = len(cells) in (2, 3) and bool(Path(cells[0].strip()).suffix)
        return sum(map(bool, _our_columns(cells))), paths, tabs and delimiter == "\t"

    return max(_DELIMITERS, key=fits)


def _our_columns(header: Sequence[str]) -> list[str]:
    """Return our name for each column, "" for others; of several that could be one of ours, the most usual."""
    cells = [cell.strip().lower() for cell in header]
    ours = [""] * len(cells)
    for name, usual in _COLUMNS.items():
        column = next((cells.index(cell) for cell in usual if cell in cells), None)
        if column is not None:
            ours[column] = name
    captions = [i for i, cell in enumerate(cells) if not ours[i] and CAPTION.fullmatch(cell)]
    for number, i in enumerate(captions):
        ours[i] = f"caption {number + 1}" if len(captions) > 1 else "caption"
    return ours


def _labels(
    file: Path, rows: Sequence[Row], columns: set[str]
) -> tuple[Sequence[str] | Sequence[int], tuple[str, ...] | None]:
    """Return labels, and class names where numbers have a column of names beside them, in the order of the numbers."""
    if "label" not in columns:
        return [row["class"] for row in rows], None
    labels = [row["label"] for row in rows]
    if "class" not in columns or 2 * sum(label[-1:].isdecimal() for label in labels) <= len(labels):
        return labels, None
    names = dict[str, str]()
    for row in rows:
        if row["class"] and names.setdefault(row["label"], row["class"]) != row["class"]:
            both = f"{names[row['label']]} and {row['class']}"
            raise DataError(f"{file}: label {row['label']} is named both {both}", hint=_HINT)
    order = {label: i for i, label in enumerate(sorted(set(labels), key=natural))}
    return [order[label] for label in labels], tuple(names.get(label, label) for label in order)


def _here(paths: Sequence[str], folder: Path) -> tuple[list[str], list[str]]:
    """Return paths as this machine writes them, and what to remark; those of a Windows machine become its own."""
    if os.name == "nt" or not any("\\" in path or _WINDOWS.match(path) for path in paths):
        return list(paths), []
    local = [p if "\\" not in p or (folder / p).exists() else p.replace("\\", "/") for p in paths]
    if not all(map(_WINDOWS.match, paths)):
        return local, []
    tails = [PureWindowsPath(path).parts[1:] for path in paths]
    for cut in range(len(tails[0])):  # C:\data\images\cat\0.jpg may be images/cat/0.jpg beside the table
        if (folder / Path(*tails[0][cut:])).exists() and all(len(tail) > cut for tail in tails):
            gone = PureWindowsPath(*PureWindowsPath(paths[0]).parts[: cut + 1])
            return [Path(*tail[cut:]).as_posix() for tail in tails], [
                f"what lay in {gone} was found beside it"
            ]
    return local, []


def _names(paths: Sequence[str]) -> list[str]:
    """Return paths as written; what absolute ones have in common is cut off, so that they are the same elsewhere."""
    absolute = [Path(path).parent for path in paths if Path(path).is_absolute()]
    common = Path(os.path.commonpath(absolute)) if absolute else Path()
    return [(p.relative_to(common) if p.is_absolute() else p).as_posix() for p in map(Path, paths)]


@dataclass(frozen=True)
class _Wilds:
    """A data set of WILDS by the columns of its metadata.csv.

    Source: Koh et al. 2021, arXiv 2012.07421; paths, labels and groups are those of its own loaders.

    Attributes:
        classes: names by label; None: those in categories.csv.
        group: what its worst-group accuracy is about.
    """

    name: str
    columns: frozenset[str]
    classes: Mapping[str, str] | None
    path: Callable[[Row], str]
    label: str
    group: Callable[[Row, str], str]
    split: Callable[[Row], str]

    def names(self, folder: Path) -> Mapping[str, str]:
        """Return class names by label, as texts."""
        if self.classes is not None:
            return self.classes
        file = folder / "categories.csv"
        if not file.is_file():
            return {}
        return {row.get("y", ""): row.get("name", "") for row in csv.DictReader(io.StringIO(_text(file)[0]))}

    def row(self, cells: Row, names: Mapping[str, str]) -> Row:
        """Return a line's cells by our names of columns."""
        label = cells[self.label].removesuffix(".0")
        name = names.get(label, "")
        group = self.group(cells, name or label)
        return {
            "path": self.path(cells),
            "label": label,
            "class": name,
            "group": group,
            "split": self.split(cells),
        }


_WILDS = (
    _Wilds(
        "Waterbirds",
        frozenset({"img_filename", "y", "place", "split"}),
        {"0": "landbird", "1": "waterbird"},
        lambda cells: cells["img_filename"],
        "y",
        lambda cells, name: f"{name} on {'water' if cells['place'].startswith('1') else 'land'}",
        lambda cells: cells["split"],
    ),
    _Wilds(
        "iWildCam",
        frozenset({"filename", "y", "location_remapped", "split"}),
        None,
        lambda cells: f"train/{cells['filename']}",
        "y",
        lambda cells, name: f"location {cells['location_remapped']}",
        lambda cells: cells["split"],
    ),
    _Wilds(
        "Camelyon17",
        frozenset({"patient", "node", "x_coord", "y_coord", "tumor", "center", "split"}),
        {"0": "normal tissue", "1": "tumor tissue"},
        lambda c: "patches/patient_{p}_node_{n}/patch_patient_{p}_node_{n}_x_{x}_y_{y}.png".format(
            p=c["patient"].zfill(3), n=c["node"], x=c["x_coord"], y=c["y_coord"]
        ),
        "tumor",
        lambda cells, name: f"hospital {cells['center']}",
        # The hospital decides: 1 is validation and 2 is test out of distribution, split 1 is validation within it.
        lambda c: {"1": "val", "2": "test"}.get(c["center"], "id_val" if c["split"] == "1" else "train"),
    ),
)
