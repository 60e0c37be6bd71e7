"""Read tables that hold images with their labels: NumPy's .npz, Parquet as Hugging Face stores images."""

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from clipmerge.data.csv_table import CAPTION
from clipmerge.data.raw_split import Pick, RawSplit, part_files
from clipmerge.data.stored import FileImages, Stored, file_stamp
from clipmerge.errors import DataError, MissingExtraError
from clipmerge.text import and_more

__all__ = ["npz", "parquet"]

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
            others = and_more([key for key in file.files if key not in _NAMES])
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as .npz: {error}", hint=_NPZ_HINT) from error
    if "labels" not in arrays or not ("images" in arrays or {"blob", "offsets"} <= arrays.keys()):
        held = f": it holds {others}" if others else ""
        raise DataError(f"{path} has no labels, or no images{held}", hint=_NPZ_HINT)
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
    seen = list[str]()

    def first(parts: Sequence[str]) -> str:
        seen.extend(parts)
        return parts[0]

    paths = part_files(place, (".parquet",), first)
    files, where, rows = list[str](), list[tuple[str, int, int]](), list[dict[str, Any]]()
    try:
        schema = pq.read_schema(paths[0])
        # One part of files whose rows name theirs, as in flickr30k, is no part at all.
        by_row = len(seen) == 1 and "split" in schema.names and "string" in str(schema.field("split").type)
        if not by_row:
            paths = part_files(place, (".parquet",), pick)
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {})
        features = {k: v for k, v in info.get("features", {}).items() if isinstance(v, dict)}
        image, label, captions = _columns(place, schema.names, features)
        kind = schema.field(image).type
        has_path = hasattr(kind, "get_field_index") and kind.get_field_index("path") >= 0
        columns = (f"{image}.path" if has_path else None, label, *captions, "split" if by_row else None)
        wanted = [name for name in columns if name]
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
    texts = [_captions([row[name] for name in captions]) for row in rows]
    there = [i for i, row in enumerate(rows) if (row[label] is not None if label else texts[i])]
    lacks = "label" if label else "caption"
    unusable = [f"{items[i]}: no {lacks}" for i in sorted({*range(len(rows))} - {*there})]
    classes = features.get(label, {}).get("names") if label else None
    pairs = [(i, text) for i in there for text in (texts[i][:1] or [""] if label else texts[i])]
    return RawSplit(
        FileImages(files, _read_row, where),
        [items[i] for i, _ in pairs],
        [_text(rows[i][label]) for i, _ in pairs] if label else None,
        None if classes is None else tuple(classes),
        [rows[i]["split"] or "" for i, _ in pairs] if by_row else None,
        unusable,
        captions=[text for _, text in pairs] if captions else None,
        which=[i for i, _ in pairs],
    )


def _captions(cells: Sequence[Any]) -> list[str]:
    """Return an image's captions: one per column, or lists of them."""
    listed = [text for cell in cells for text in (cell if isinstance(cell, list) else [cell])]
    return [str(text).strip() for text in listed if text is not None and str(text).strip()]


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


def _columns(place: str, names: Sequence[str], features: dict[str, Any]) -> tuple[str, str | None, list[str]]:
    """Return which columns hold images, labels and captions: by Hugging Face's features, else by name."""

    def first(kind: str) -> str | None:
        typed = [name for name in names if features.get(name, {}).get("_type") == kind]
        usual = [name for name in _PARQUET_COLUMNS[kind] if name in names]
        return next(iter([name for name in usual if name in typed] + typed + usual), None)

    image, label = map(first, _PARQUET_COLUMNS)
    captions = [name for name in names if name not in (image, label) and CAPTION.fullmatch(name.lower())]
    if image is None or not (label or captions):
        raise DataError(
            f"{place} has no images with labels or captions, its columns: {', '.join(names)}",
            hint=_PARQUET_HINT,
        )
    return image, label, captions
