"""Shards: WebDataset as CLIP_benchmark lays it out, and Parquet as Hugging Face stores images."""

import json
import tarfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np

from clipmerge.data.check import Bad
from clipmerge.data.found import Found, Pick, is_part
from clipmerge.data.images import Encoded, InFiles
from clipmerge.data.prompts import checked
from clipmerge.errors import DataError, MissingExtraError

_IMAGES = ("jpg", "jpeg", "png", "webp")
_WDS = (
    "shards are uncompressed .tar files of KEY.jpg (.png, .webp) with KEY.cls, a label in digits, or KEY.txt"
)


def webdataset(place: str, pick: Pick) -> Found:
    """A .tar, or a folder of them: `classnames.txt`, `zeroshot_classification_templates.txt`, `test/*.tar`.

    Images are not taken out: they are read from where they lie in the shards.
    """
    root = Path(place)
    shards = _part(root, "tar", pick)
    items: dict[str, dict[str, Any]] = {}
    for shard in shards:
        _index(shard, items)
    good = {k: v for k, v in items.items() if "image" in v and ("cls" in v or "txt" in v)}
    labelled = [key for key, item in good.items() if "cls" in item]
    if labelled:
        good = {key: good[key] for key in labelled if good[key]["cls"].lstrip("-").isdecimal()}
    bad = [Bad(k, _wds_problem(v)) for k, v in items.items() if k not in good and "image" in v]
    if not good and not bad:
        raise DataError(f"{place} holds no images with labels", hint=_WDS)
    captions = [item.get("txt", "") for item in good.values()]
    return Found(
        InFiles([v["image"][0] for v in good.values()], [v["image"][1:] for v in good.values()]),
        list(good),
        np.array([int(v["cls"]) for v in good.values()], np.int64) if labelled else None,
        _text_lines(_beside(root, "classnames.txt")),
        bad=tuple(bad),
        captions=captions if any(captions) else None,
        templates=_templates(_beside(root, "zeroshot_classification_templates.txt")),
    )


def _index(shard: Path, items: dict[str, dict[str, Any]]) -> None:
    """Adds what a shard holds: where its images lie, and its labels and captions as text."""
    size = shard.stat().st_size
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                key, _, kind = member.name.rpartition("/")[2].partition(".")
                kind = kind.lower()
                item = items.setdefault(f"{member.name.rpartition('/')[0]}/{key}".lstrip("./"), {})
                if not member.isreg() or member.offset_data + member.size > size:
                    continue
                if kind in _IMAGES:
                    item["image"] = (shard, member.offset_data, member.size)
                elif kind in ("cls", "txt") and member.size < 2**16:
                    file = tar.extractfile(member)
                    item[kind] = "" if file is None else file.read().decode("utf-8", "replace").strip()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{shard} cannot be read as a .tar: {error}", hint=_WDS) from error


def _wds_problem(item: Mapping[str, Any]) -> str:
    return f"its .cls is {item['cls'][:20]!r}, not a number" if "cls" in item else "no .cls beside it"


def _part(root: Path, suffix: str, pick: Pick) -> list[Path]:
    """The files of one part: those in a folder `test`, or whose names begin with `test`; else all."""
    if root.is_file():
        pick([""])
        return [root]
    files = sorted(p for pattern in ("*", "*/*") for p in root.glob(f"{pattern}.{suffix}") if p.is_file())
    parts: dict[str, list[Path]] = {}
    for path in files:
        word = path.name.replace("_", "-").replace(".", "-").partition("-")[0]
        below = path.parent.name if path.parent != root else ""
        part = below if is_part(below) else word if is_part(word) else ""
        parts.setdefault(part, []).append(path)
    return parts[pick(sorted(parts))]


def _beside(root: Path, name: str) -> Path:
    """A file of the data set's: in its folder, or above where a part of it was named."""
    folder = root if root.is_dir() else root.parent
    return folder.parent / name if is_part(folder.name) and not (folder / name).is_file() else folder / name


def _text_lines(path: Path) -> tuple[str, ...] | None:
    if not path.is_file():
        return None
    return tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())


def _templates(path: Path) -> tuple[str, ...] | None:
    lines = _text_lines(path)
    return None if lines is None else checked(lines, str(path))


def parquet(place: str, pick: Pick) -> Found:
    """A .parquet, or a folder of them, with a column of images, as Hugging Face's data sets store them.

    Class names come from the features in the file's metadata. Image bytes are read a row group at a time.
    """
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise MissingExtraError("pyarrow", extra="parquet", what=f"reading {place}") from error
    paths = _part(Path(place), "parquet", pick)
    try:
        files = [pq.ParquetFile(path) for path in paths]
        columns = _columns(place, files[0].schema_arrow)
        groups = [(path, f, g) for path, f in zip(paths, files, strict=True) for g in range(f.num_row_groups)]
        wanted = [name for name in (columns.path, columns.label, columns.caption) if name]
        tables = [f.read_row_group(g, columns=wanted) for _, f, g in groups]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{place} cannot be read as Parquet: {error}", hint=_PARQUET) from error
    rows = [row for table in tables for row in table.to_pylist()]
    where = [(g, r) for g, (_, f, n) in enumerate(groups) for r in range(f.metadata.row_group(n).num_rows)]
    reader = _RowGroups([(f, n) for _, f, n in groups], columns.image)
    stamps = [_stamp(path, n) for path, _, n in groups]
    labels = [row[columns.label] for row in rows] if columns.label else None
    names = [((row.get(columns.image) or {}).get("path") if columns.path else None) for row in rows]
    return Found(
        Encoded(
            len(rows), lambda i: reader.read(*where[i]), lambda i: f"{stamps[where[i][0]]}\0{where[i][1]}"
        ),
        [name or f"row {i:06d}" for i, name in enumerate(names)],
        _parquet_labels(labels),
        columns.classes,
        captions=[str(row[columns.caption]) for row in rows] if columns.caption else None,
    )


_PARQUET = "a column image (bytes, or bytes with a path) and a column label (numbers or words) or text"


@dataclass(frozen=True, slots=True)
class _Columns:
    image: str
    path: str | None
    label: str | None
    caption: str | None
    classes: tuple[str, ...] | None


def _columns(place: str, schema: Any) -> _Columns:
    """Which columns are which, by the features that Hugging Face writes, else by name."""
    stored = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = stored.get("info", {}).get("features", {})
    kinds = {name: f.get("_type") for name, f in features.items() if isinstance(f, dict)}

    def first(kind: str, names: Sequence[str]) -> str | None:
        typed = [name for name in schema.names if kinds.get(name) == kind]
        listed = [name for name in names if name in schema.names]
        return next((n for n in listed if n in typed), None) or (typed + listed + [None])[0]

    image = first("Image", ("image", "img", "jpg", "png", "webp"))
    label = first("ClassLabel", ("label", "labels", "fine_label", "cls", "target"))
    caption = first("Caption", ("caption", "text"))
    if image is None or not (label or caption):
        listed = ", ".join(schema.names)
        raise DataError(
            f"{place} has no images with labels or captions, its columns: {listed}", hint=_PARQUET
        )
    kind = schema.field(image).type
    has_path = hasattr(kind, "get_field_index") and kind.get_field_index("path") >= 0
    names = features.get(label, {}).get("names") if label else None
    return _Columns(
        image, f"{image}.path" if has_path else None, label, caption, None if names is None else tuple(names)
    )


def _parquet_labels(labels: Sequence[Any] | None) -> Any:
    if labels is None or any(isinstance(label, str) for label in labels):
        return None if labels is None else [str(label) for label in labels]
    return np.array([-1 if label is None else label for label in labels], np.int64)


def _stamp(path: Path, group: int) -> str:
    status = path.stat()
    return f"{path.absolute()}\0{group}\0{status.st_size}\0{status.st_mtime_ns}"


@dataclass(slots=True)
class _RowGroups:
    """Encoded images by row group and row; the groups read last stay in memory."""

    groups: Sequence[tuple[Any, int]]
    column: str
    keep: int = 4
    _read: OrderedDict[int, Any] = field(default_factory=OrderedDict)
    _lock: Lock = field(default_factory=Lock)

    def read(self, group: int, row: int) -> bytes:
        with self._lock:
            if group not in self._read:
                file, number = self.groups[group]
                self._read[group] = file.read_row_group(number, columns=[self.column]).column(self.column)
                while len(self._read) > self.keep:
                    self._read.popitem(last=False)
            self._read.move_to_end(group)
            value = self._read[group][row].as_py()
        stored = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(stored, bytes):
            raise ValueError("no bytes in this row")
        return stored
