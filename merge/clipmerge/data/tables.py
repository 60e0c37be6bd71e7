"""Read tables of images and labels: CSV and TSV files of paths, NumPy's .npz, Parquet as Hugging Face stores images."""

import csv
import json
import os
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from clipmerge.data.raw_split import Pick, RawSplit, part_files
from clipmerge.data.stored import FileImages, Stored, file_stamp
from clipmerge.errors import DataError, MissingExtraError
from clipmerge.text import natural

__all__ = ["npz", "parquet", "table"]

_CSV_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "path": ("path", "filepath", "file", "filename", "file_name", "image", "image_path", "img", "img_path"),
    "label": ("label", "target", "class", "category", "y", "class_id"),
    "class": ("class_name", "classname", "label_name"),
    "caption": ("caption", "text", "title"),
    "group": ("group", "groups"),
    "split": ("split", "partition", "fold"),
}
_CSV_HINT = (
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
        raise DataError(f"{place} has no column of paths with one of labels or captions", hint=_CSV_HINT)
    unusable = [f"line {n}: no {key}" for n, row in lines.items() for key in needed if not row[key]]
    rows = [row for row in lines.values() if all(row[key] for key in needed)]
    if not rows and not unusable:
        raise DataError(f"{place} lists no images", hint=_CSV_HINT)
    groups = {row["group"] for row in rows if "group" in columns}
    group_names = sorted(groups, key=natural)
    paths = [row["path"] for row in rows]
    labels: Sequence[str] | Sequence[int] | None = [row[needed[1]] for row in rows] if label_columns else None
    classes = None
    if len(label_columns) == 2:
        labels, classes = _named(place, rows)
    return RawSplit(
        FileImages([str(Path(place).parent / path) for path in paths]),
        _names(paths),
        labels,
        classes,
        [row.get("split", "") for row in rows],
        unusable,
        groups=[group_names.index(row["group"]) for row in rows] if group_names else None,
        group_names=tuple(group_names) or None,
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
        raise DataError(f"{place} cannot be read as a table: {error}", hint=_CSV_HINT) from error
    header = [cell.lower() for cell in next(iter(lines.values()), [])]
    ours = [next((name for name, theirs in _CSV_COLUMNS.items() if cell in theirs), "") for cell in header]
    if "path" not in ours and len(header) in (2, 3) and Path(header[0]).suffix:
        ours = ["path", "label", "group"][: len(header)]
    elif lines:
        del lines[min(lines)]
    names = set(ours) - {""}
    empty = dict.fromkeys(names, "")
    rows = {n: empty | dict(zip(ours, cells, strict=False)) for n, cells in lines.items() if any(cells)}
    return rows, names


def _named(place: str, rows: Sequence[Row]) -> tuple[Sequence[str] | Sequence[int], tuple[str, ...] | None]:
    """Return labels and class names of a table with a column for each, classes in the order of their labels."""
    names = dict[str, str]()
    for row in rows:
        if names.setdefault(row["label"], row["class"]) != row["class"]:
            both = f"{names[row['label']]} and {row['class']}"
            raise DataError(f"{place}: label {row['label']} is named both {both}", hint=_CSV_HINT)
    order = {label: i for i, label in enumerate(sorted(names, key=natural))}
    return [order[row["label"]] for row in rows], tuple(names[label] for label in order)


def _names(paths: Sequence[str]) -> list[str]:
    """Return paths as written; what absolute ones have in common is cut off, so that they are the same elsewhere."""
    absolute = [Path(path).parent for path in paths if Path(path).is_absolute()]
    common = Path(os.path.commonpath(absolute)) if absolute else Path()
    return [(p.relative_to(common) if p.is_absolute() else p).as_posix() for p in map(Path, paths)]


Arrays = Mapping[str, npt.NDArray[Any]]

_NAMES = frozenset({"labels", "images", "blob", "offsets", "split", "classes", "groups", "group_names"})
_PARTS: Mapping[object, str] = {0: "train", 1: "val", 2: "test"}
_NPZ_HINT = (
    "an .npz holds labels (n), split (n; 0 train, 1 val, 2 test), classes, and images (n, H, W) or "
    "(n, H, W, 3) in uint8, or blob (uint8) with offsets (n + 1) of encoded images"
)


@dataclass(frozen=True)
class NpzImages:
    """The images of an .npz. A worker process reads the file again instead of getting a copy of the arrays."""

    path: str
    images: Sequence[Stored] | npt.NDArray[np.uint8]

    def __reduce__(self) -> tuple[Any, ...]:
        return _read_again, (self.path,)

    def fetch(self, i: int) -> Stored:
        return self.images[i]

    def stamp(self, i: int) -> str:
        return f"{file_stamp(self.path)}\0{i}"


def _read_again(path: str) -> NpzImages:
    return NpzImages(path, _images(_load(path)))


def npz(place: str, pick: Pick) -> RawSplit:
    """Read an .npz: `labels`, and `images` or `blob` with `offsets`; maybe `split`, `classes`, `groups`."""
    arrays = _load(place)
    labels, classes = arrays["labels"], arrays.get("classes")
    wrong = [key for key in ("split", "groups") if key in arrays and arrays[key].shape != labels.shape]
    if wrong or not _fit(arrays):
        shapes = ", ".join(f"{key} {array.dtype} {array.shape}" for key, array in arrays.items())
        length = f"{', '.join(wrong)} of another length; " if wrong else ""
        raise DataError(f"{place}: its arrays do not fit together ({length}{shapes})", hint=_NPZ_HINT)
    numbers = arrays["split"].tolist() if "split" in arrays else [""] * len(labels)
    return RawSplit(
        NpzImages(place, _images(arrays)),
        [f"{i:06d}" for i in range(len(labels))],
        (labels if labels.dtype.kind == "U" else labels.astype(np.int64)).tolist(),
        None if classes is None else tuple(map(str, classes)),
        [_PARTS.get(number, str(number)) for number in numbers],
        groups=arrays["groups"].astype(np.int64) if "groups" in arrays else None,
        group_names=tuple(map(str, arrays["group_names"])) if "group_names" in arrays else None,
    )


def _load(path: str) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files if key in _NAMES}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as .npz: {error}", hint=_NPZ_HINT) from error
    if "labels" not in arrays or not ("images" in arrays or {"blob", "offsets"} <= arrays.keys()):
        raise DataError(f"{path} has no labels, or no images", hint=_NPZ_HINT)
    return arrays


def _images(arrays: Arrays) -> Sequence[bytes] | npt.NDArray[np.uint8]:
    if "images" in arrays:
        return arrays["images"]
    return [arrays["blob"][start:end].tobytes() for start, end in pairwise(arrays["offsets"].tolist())]


def _fit(arrays: Arrays) -> bool:
    """Return whether labels and images have the dtypes and shapes that they should have."""
    labels, data = arrays["labels"], arrays["images"] if "images" in arrays else arrays["blob"]
    whole = labels.dtype.kind in "biuU" or (
        labels.dtype.kind == "f" and bool((labels == np.floor(labels)).all())
    )
    if not whole or labels.ndim != 1 or data.dtype != np.uint8:
        return False
    if "images" in arrays:
        return len(data) == len(labels) and (data.ndim == 3 or (data.ndim == 4 and data.shape[3] == 3))
    offsets = arrays["offsets"].astype(np.int64)
    rising = bool((np.diff(offsets, prepend=0, append=len(data)) >= 0).all())
    return len(offsets) == len(labels) + 1 and rising


_PARQUET_HINT = "a column image (bytes, or bytes with a path) and a column label (numbers or words) or text"
_PARQUET_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "Image": ("image", "img", "jpg", "png", "webp"),
    "ClassLabel": ("label", "labels", "fine_label", "cls", "target"),
    "Caption": ("caption", "text"),
}
"""Hugging Face's type of a column → usual names of such columns."""


def parquet(place: str, pick: Pick) -> RawSplit:
    """Read a .parquet, or a folder of them, with a column of images, as Hugging Face's data sets store them.

    Class names come from the features in the file's metadata.
    """
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError("pyarrow", extra="parquet", what=f"reading {place}") from error
    paths = part_files(place, (".parquet",), pick)
    files, where, rows = list[str](), list[tuple[str, int, int]](), list[dict[str, Any]]()
    try:
        schema = pq.read_schema(paths[0])
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {})
        features = {k: v for k, v in info.get("features", {}).items() if isinstance(v, dict)}
        image, label, caption = _columns(place, schema.names, features)
        kind = schema.field(image).type
        has_path = hasattr(kind, "get_field_index") and kind.get_field_index("path") >= 0
        wanted = [name for name in (f"{image}.path" if has_path else None, label, caption) if name]
        for path in paths:
            with pq.ParquetFile(path) as file:
                rows += file.read(columns=wanted).to_pylist()
                sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
            where += [(image, group, row) for group, size in enumerate(sizes) for row in range(size)]
            files += [str(path)] * sum(sizes)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{place} cannot be read as Parquet: {error}", hint=_PARQUET_HINT) from error
    names = [(row[image] or {}).get("path") if has_path else None for row in rows]
    items = [name or f"row {i:06d}" for i, name in enumerate(names)]
    there = [i for i, row in enumerate(rows) if not label or row[label] is not None]
    unusable = [f"{items[i]}: no label" for i in sorted({*range(len(rows))} - {*there})]
    classes = features.get(label, {}).get("names") if label else None
    return RawSplit(
        FileImages(files, _read_row, where),
        [items[i] for i in there],
        [_text(rows[i][label]) for i in there] if label else None,
        None if classes is None else tuple(classes),
        unusable=unusable,
        captions=[str(rows[i][caption]) for i in there] if caption else None,
        which=there,
    )


def _text(label: object) -> str:
    return str(int(label) if isinstance(label, bool) else label)


_reading = Lock()
"""Threads that ask for neighbouring rows wait for one of them to read the row group."""


def _read_row(path: str, where: tuple[str, int, int]) -> bytes:
    column, group, row = where
    with _reading:
        value = _row_group(path, file_stamp(path), group, column)[row].as_py()
    stored = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(stored, bytes):
        raise ValueError("no bytes in this row")
    return stored


@lru_cache(maxsize=4)
def _row_group(path: str, stamp: str, group: int, column: str) -> Any:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        return file.read_row_group(group, columns=[column]).column(column)


def _columns(
    place: str, names: Sequence[str], features: dict[str, Any]
) -> tuple[str, str | None, str | None]:
    """Return which columns hold images, labels and captions: by Hugging Face's features, else by name."""

    def first(kind: str) -> str | None:
        typed = [name for name in names if features.get(name, {}).get("_type") == kind]
        usual = [name for name in _PARQUET_COLUMNS[kind] if name in names]
        return next(iter([name for name in usual if name in typed] + typed + usual), None)

    image, label, caption = map(first, _PARQUET_COLUMNS)
    if image is None or not (label or caption):
        raise DataError(
            f"{place} has no images with labels or captions, its columns: {', '.join(names)}",
            hint=_PARQUET_HINT,
        )
    return image, label, caption
