"""Read WebDataset shards as CLIP_benchmark and img2dataset lay them out."""

import bz2
import gzip
import lzma
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from clipmerge.checkpoint.cache import cache_dir
from clipmerge.checkpoint.output import whole_file
from clipmerge.data.prompts import check_templates, read_list
from clipmerge.data.raw_split import IMAGE_SUFFIXES, Pick, RawSplit, is_part, part_files, relative_names
from clipmerge.data.stored import FileImages, file_stamp
from clipmerge.errors import DataError

__all__ = ["SHARD_SUFFIXES", "webdataset"]

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")

_TEMPLATES = "zeroshot_classification_templates.txt"
_HINT = (
    "shards are .tar files, uncompressed or .tar.gz, of KEY.jpg (.png, .webp …) with KEY.cls, a label in digits or "
    "a class's name, or KEY.txt, one caption per line"
)
_PACKED: Sequence[tuple[bytes, Any]] = (
    (b"\x1f\x8b", gzip.open),
    (b"BZh", bz2.open),
    (b"\xfd7zXZ\x00", lzma.open),
)


@dataclass(slots=True)
class _Item:
    """What lies under one key of one shard: where its image is in which file, and its label and captions as text."""

    key: str
    image: tuple[str, tuple[int, int]] | None = None
    cls: str | None = None
    txt: str | None = None
    reason: str | None = None

    @property
    def has_image(self) -> bool:
        return self.image is not None or self.reason is not None


def webdataset(place: str, pick: Pick) -> RawSplit:
    """Read a .tar, several (`{0000..0099}.tar`, `a.tar::b.tar`), or a folder of them with `test/*.tar`.

    Class names and templates lie beside them in `classnames.txt` and `zeroshot_classification_templates.txt`. Images
    are not taken out: they are read from where they lie in the shards.
    """
    paths = part_files(place, SHARD_SUFFIXES, pick)
    if not paths:
        raise DataError(f"{place} holds no shards", hint=_HINT)
    shards = [_index(path) for path in paths]
    names = [re.sub(r"\.(tar(\.\w+)?|tgz)$", "", name) for name in relative_names(paths)]
    keys = Counter(key for shard in shards for key in {item.key for item in shard})
    if any(
        count > 1 for count in keys.values()
    ):  # keys that restart in each shard name its items with the shard
        for name, shard in zip(names, shards, strict=True):
            for item in shard:
                item.key = f"{name}/{item.key}"
    items = [item for shard in shards for item in shard]
    if not any(item.has_image for item in items):
        raise DataError(f"{place} holds no images with labels", hint=_HINT)
    labelled = any(item.cls is not None for item in items)
    reasons = [(item, _reason(item, labelled)) for item in items]
    good = [item for item, reason in reasons if reason is None]
    rows = [(i, caption) for i, item in enumerate(good) for caption in _captions(item, labelled)]
    places = [item.image for item in good if item.image is not None]
    root = paths[0].parent
    beside = [
        root,
        *([root.parent] if is_part(root.name) else []),
        *([Path(place)] if Path(place).is_dir() else []),
    ]
    templates = _lines_beside(beside, _TEMPLATES)
    return RawSplit(
        FileImages([path for path, _ in places], _read_run, [where for _, where in places]),
        [good[i].key for i, _ in rows],
        [str(good[i].cls) for i, _ in rows] if labelled else None,
        _lines_beside(beside, "classnames.txt"),
        unusable=[f"{item.key}: {reason}" for item, reason in reasons if reason is not None],
        captions=[caption for _, caption in rows] if any(caption for _, caption in rows) else None,
        templates=None if templates is None else check_templates(templates, _TEMPLATES),
        which=[i for i, _ in rows],
    )


def _captions(item: _Item, labelled: bool) -> list[str]:
    """Return the captions of an image, one per line of its .txt; beside labels it has one, or none ("")."""
    lines = list(filter(None, map(str.strip, (item.txt or "").splitlines())))
    return [" ".join(lines)] if labelled else lines


def _reason(item: _Item, labelled: bool) -> str | None:
    """Return why an item cannot be used, None where it can."""
    if not item.has_image:
        return f"no image beside its .{'txt' if item.cls is None else 'cls'}"
    if labelled:
        return item.reason or (None if item.cls else "no .cls beside it")
    return item.reason or (None if item.txt else "no .cls or .txt beside it")


def _read_run(path: str, where: tuple[int, int]) -> bytes:
    offset, size = where
    with Path(path).open("rb") as file:
        file.seek(offset)
        return file.read(size)


def _index(shard: Path) -> list[_Item]:
    """List what a shard holds, in its order. A key that comes again with another image is another item."""
    plain = _unpacked(shard)
    size, items, further = plain.stat().st_size, dict[str, list[_Item]](), dict[str, str]()
    try:
        with tarfile.open(plain, "r:") as tar:
            for member in tar:
                if member.isdir():
                    continue
                name = member.name.removeprefix("./").lstrip("/")
                folder, _, base = name.rpartition("/")
                first, _, kind = base.partition(".")
                key = f"{folder}/{first}" if folder else first
                if f".{kind.lower()}" not in IMAGE_SUFFIXES and kind.lower() not in ("cls", "txt"):
                    # WebDataset cuts at the first dot; "photo.001.jpg" is an image all the same.
                    stem, _, kind = name.rpartition(".")
                    key, base_key = stem, key
                    if f".{kind.lower()}" not in IMAGE_SUFFIXES and kind.lower() not in ("cls", "txt"):
                        continue
                    further[key] = base_key
                field = "image" if f".{kind.lower()}" in IMAGE_SUFFIXES else kind.lower()
                same = items.setdefault(key, [])
                item = next(
                    (i for i in same if not (i.has_image if field == "image" else getattr(i, field))), None
                )
                if item is None:
                    same.append(item := _Item(key))
                if field == "image":
                    if not member.isreg():
                        item.reason = "a link, which is not followed"
                    elif member.offset_data + member.size > size:
                        item.reason = "the shard is cut off inside it"
                    else:
                        item.image = (str(plain), (member.offset_data, member.size))
                elif member.isreg() and member.size < 2**16:
                    file = tar.extractfile(member)
                    setattr(
                        item, field, "" if file is None else file.read().decode("utf-8", "replace").strip()
                    )
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(f"{shard} cannot be read as a .tar: {error}", hint=_HINT) from error
    for (
        key,
        base_key,
    ) in further.items():  # "s0.0.webp" has the label of "s0"; "s0.mask.png" beside "s0.jpg" is no item
        owner = next(iter(items.get(base_key, [])), None)
        if owner is not None and owner.has_image:
            del items[key]
        elif owner is not None:
            for item in items[key]:
                item.cls, item.txt = item.cls or owner.cls, item.txt or owner.txt
            items[base_key] = []
    return [item for same in items.values() for item in same]


def _unpacked(shard: Path) -> Path:
    """Return a shard that can be read at any place: where it is compressed, its copy in the cache.

    Raises:
        DataError: it cannot be read. OutputError: there is no room for the copy.
    """
    with shard.open("rb") as file:
        head = file.read(6)
    opener = next((opener for magic, opener in _PACKED if head.startswith(magic)), None)
    if opener is None:
        return shard
    path = cache_dir() / "shards" / f"{blake3(file_stamp(str(shard)).encode()).hexdigest()}.tar"
    if not path.exists():
        with whole_file(path, parents=True) as sibling, sibling.open("wb") as out:
            out.writelines(_unpack(shard, opener))
    return path


def _unpack(shard: Path, opener: Any) -> Iterator[bytes]:
    try:
        with opener(shard) as packed:
            while piece := packed.read(2**20):
                yield piece
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{shard} cannot be read as a .tar: {error}", hint=_HINT) from error


def _lines_beside(folders: Sequence[Path], name: str) -> tuple[str, ...] | None:
    """Return the lines of a file of the data set's, from the first of these folders that has it."""
    for folder in folders:
        if (folder / name).is_file():
            return tuple(read_list(folder / name, name, _HINT, by_line=name != _TEMPLATES))
    return None
