"""Read WebDataset shards as CLIP_benchmark lays them out."""

import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from clipmerge.data.prompts import check_templates
from clipmerge.data.raw_split import Pick, RawSplit, is_part, part_files
from clipmerge.data.stored import FileImages
from clipmerge.data.survey import Unusable
from clipmerge.errors import DataError

__all__ = ["webdataset"]

_IMAGES = ("jpg", "jpeg", "png", "webp")
_TEMPLATES = "zeroshot_classification_templates.txt"
_HINT = (
    "shards are uncompressed .tar files of KEY.jpg (.png, .webp) with KEY.cls, a label in digits, or KEY.txt"
)


def webdataset(place: str, pick: Pick) -> RawSplit:
    """Read a .tar, or a folder of them: `classnames.txt`, `zeroshot_classification_templates.txt`, `test/*.tar`.

    Images are not taken out: they are read from where they lie in the shards.
    """
    root = Path(place)
    shards = part_files(root, "tar", pick)
    items: dict[str, dict[str, Any]] = {}
    for shard in shards:
        _index(shard, items)
    good = {k: v for k, v in items.items() if "image" in v and ("cls" in v or "txt" in v)}
    labelled = [key for key, item in good.items() if "cls" in item]
    if labelled:
        good = {key: good[key] for key in labelled if good[key]["cls"].lstrip("-").isdecimal()}
    unusable = [Unusable(k, _problem(v)) for k, v in items.items() if k not in good and "image" in v]
    if not good and not unusable:
        raise DataError(f"{place} holds no images with labels", hint=_HINT)
    templates = _lines_beside(root, _TEMPLATES)
    captions = [item.get("txt", "") for item in good.values()]
    return RawSplit(
        FileImages([v["image"][0] for v in good.values()], [v["image"][1:] for v in good.values()]),
        list(good),
        np.array([int(v["cls"]) for v in good.values()], np.int64) if labelled else None,
        _lines_beside(root, "classnames.txt"),
        unusable=tuple(unusable),
        captions=captions if any(captions) else None,
        templates=None if templates is None else check_templates(templates, _TEMPLATES),
    )


def _index(shard: Path, items: dict[str, dict[str, Any]]) -> None:
    """Add what a shard holds: where its images lie, and its labels and captions as text."""
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
                    item["image"] = (str(shard), member.offset_data, member.size)
                elif kind in ("cls", "txt") and member.size < 2**16:
                    file = tar.extractfile(member)
                    item[kind] = "" if file is None else file.read().decode("utf-8", "replace").strip()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{shard} cannot be read as a .tar: {error}", hint=_HINT) from error


def _problem(item: Mapping[str, Any]) -> str:
    return f"its .cls is {item['cls'][:20]!r}, not a number" if "cls" in item else "no .cls beside it"


def _lines_beside(root: Path, name: str) -> tuple[str, ...] | None:
    """Return the lines of a file of the data set's: in its folder, or above where a part of it was named."""
    folder = root if root.is_dir() else root.parent
    path = folder / name
    if is_part(folder.name) and not path.is_file():
        path = folder.parent / name
    if not path.is_file():
        return None
    return tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
