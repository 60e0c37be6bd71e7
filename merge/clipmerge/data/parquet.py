"""Read Parquet as Hugging Face stores images."""

import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from clipmerge.data.raw_split import Pick, RawSplit, part_files
from clipmerge.data.stored import FileImages, file_stamp
from clipmerge.errors import DataError, MissingExtraError
from clipmerge.types import Ints

__all__ = ["parquet"]

_HINT = "a column image (bytes, or bytes with a path) and a column label (numbers or words) or text"
_COLUMNS: Mapping[str, tuple[str, ...]] = {
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
    paths = part_files(Path(place), "parquet", pick)
    files, where, rows = list[str](), list[tuple[str, int, int]](), list[dict[str, Any]]()
    try:
        schema = pq.read_schema(paths[0])
        features = _features(schema)
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
        raise DataError(f"{place} cannot be read as Parquet: {error}", hint=_HINT) from error
    names = [(row[image] or {}).get("path") if has_path else None for row in rows]
    classes = features.get(label, {}).get("names") if label else None
    return RawSplit(
        FileImages(files, _read_row, where),
        [name or f"row {i:06d}" for i, name in enumerate(names)],
        _labels([row[label] for row in rows]) if label else None,
        None if classes is None else tuple(classes),
        captions=[str(row[caption]) for row in rows] if caption else None,
    )


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


def _features(schema: Any) -> dict[str, Any]:
    """Return what Hugging Face writes about the columns."""
    stored = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = stored.get("info", {}).get("features", {})
    return {name: feature for name, feature in features.items() if isinstance(feature, dict)}


def _columns(
    place: str, names: Sequence[str], features: dict[str, Any]
) -> tuple[str, str | None, str | None]:
    """Return which columns hold images, labels and captions: by the features, else by name."""

    def first(kind: str) -> str | None:
        typed = [name for name in names if features.get(name, {}).get("_type") == kind]
        usual = [name for name in _COLUMNS[kind] if name in names]
        return next(iter([name for name in usual if name in typed] + typed + usual), None)

    image, label, caption = map(first, _COLUMNS)
    if image is None or not (label or caption):
        raise DataError(
            f"{place} has no images with labels or captions, its columns: {', '.join(names)}", hint=_HINT
        )
    return image, label, caption


def _labels(values: Sequence[Any]) -> Ints | list[str]:
    if any(isinstance(value, str) for value in values):
        return [str(value) for value in values]
    return np.array([-1 if value is None else value for value in values], np.int64)
