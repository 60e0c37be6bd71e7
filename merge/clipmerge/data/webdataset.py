"""Read WebDataset shards as CLIP_benchmark lays them out."""

import tarfile
from pathlib import Path
from typing import Any

from clipmerge.data.prompts import check_templates, read_list
from clipmerge.data.raw_split import Pick, RawSplit, is_part, part_files
from clipmerge.data.stored import FileImages
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
    items: dict[str, dict[str, Any]] = {}
    for shard in part_files(root, "tar", pick):
        _index(shard, items)
    items = {key: item for key, item in items.items() if "image" in item}
    labelled = any("cls" in item for item in items.values())
    unusable, good = list[str](), dict[str, dict[str, Any]]()
    for key, item in items.items():
        if "cls" in item and not item["cls"].lstrip("-").isdecimal():
            unusable.append(f"{key}: its .cls is {item['cls'][:20]!r}, not a number")
        elif ("cls" if labelled else "txt") in item:
            good[key] = item
        else:
            unusable.append(f"{key}: no .cls beside it")
    if not items:
        raise DataError(f"{place} holds no images with labels", hint=_HINT)
    templates = _lines_beside(root, _TEMPLATES)
    captions = [item.get("txt", "") for item in good.values()]
    shards, where = zip(*(item["image"] for item in good.values()), strict=True) if good else ((), ())
    return RawSplit(
        FileImages(shards, _read_run, where),
        list(good),
        [item["cls"] for item in good.values()] if labelled else None,
        _lines_beside(root, "classnames.txt"),
        unusable=unusable,
        captions=captions if any(captions) else None,
        templates=None if templates is None else check_templates(templates, _TEMPLATES),
    )


def _read_run(path: str, where: tuple[int, int]) -> bytes:
    offset, size = where
    with Path(path).open("rb") as file:
        file.seek(offset)
        return file.read(size)


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
                    item["image"] = (str(shard), (member.offset_data, member.size))
                elif kind in ("cls", "txt") and member.size < 2**16:
                    file = tar.extractfile(member)
                    item[kind] = "" if file is None else file.read().decode("utf-8", "replace").strip()
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{shard} cannot be read as a .tar: {error}", hint=_HINT) from error


def _lines_beside(root: Path, name: str) -> tuple[str, ...] | None:
    """Return the lines of a file of the data set's: in its folder, or above where a part of it was named."""
    folder = root if root.is_dir() else root.parent
    for place in (folder, folder.parent) if is_part(folder.name) else (folder,):
        if (place / name).is_file():
            return tuple(read_list(place / name, name, _HINT))
    return None
