"""What the reader of a source returns, and which part of the source is meant."""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from clipmerge.data.stored import StoredImages
from clipmerge.errors import DataError
from clipmerge.text import and_more, did_you_mean
from clipmerge.types import Ints

__all__ = [
    "IMAGE_SUFFIXES", "Pick", "RawSplit", "expand", "is_part", "part_files", "pick_part", "relative_names",
]  # fmt: skip

IMAGE_SUFFIXES = frozenset({
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm",
    ".jp2", ".tga", ".avif",
})  # fmt: skip
"""What files of images end in, in class folders and in shards."""

_MOST_FILES = 100_000

_SYNONYMS: tuple[tuple[str, ...], ...] = (
    ("train", "training"),
    ("val", "valid", "validation", "dev", "holdout"),
    ("test", "testing", "eval"),
)
_PARTS = re.compile(
    rf"({'|'.join(name for names in _SYNONYMS for name in names)})([-_0-9].*)?", re.IGNORECASE
)

Pick = Callable[[Sequence[str]], str]
"""From the names of the parts that a source has to the one to take; raises where that is not among them."""


@dataclass(frozen=True, slots=True)
class RawSplit:
    """A source as it describes itself, before class names are settled and images are looked at.

    Attributes:
        labels: numbers (indices, as text too) or words, or None where there are only captions.
        classes: names by index, or the words in their order; None where the source does not say.
        empty: classes that the source has a place for but no image.
        parts: for each item the part that it belongs to, "" where there are none; None where all of them are the
            one that was asked for.
        unusable: items that the source names but does not describe well enough to use, "item: reason" each.
        which: for each item which of `images` it is; None where each has its own.
        remarks: what the reader decided or noticed, a sentence each.
    """

    images: StoredImages
    names: Sequence[str]
    labels: Sequence[int] | Sequence[str] | None
    classes: tuple[str, ...] | None = None
    parts: Sequence[str] | None = None
    unusable: Sequence[str] = ()
    empty: Sequence[str] = ()
    groups: Sequence[int] | Ints | None = None
    group_names: tuple[str, ...] | None = None
    captions: Sequence[str] | None = None
    templates: tuple[str, ...] | None = None
    which: Sequence[int] | None = None
    remarks: Sequence[str] = ()


def is_part(name: str) -> bool:
    """Return whether a folder of this name is a part of a source: "train", "val", "test_blurred" …"""
    return _PARTS.fullmatch(name) is not None


def pick_part(place: str, parts: Sequence[str], part: str | None, role: str) -> str:
    """Return the one of `parts` that `part` names, or, where it is None, the one for the role.

    A source without parts is `[""]`. A single part suits every role. Validation images stand in for test
    images where there are none, never the other way round.

    Raises:
        DataError: there is none; the hint lists those there are.
    """
    if part is None and len(parts) == 1:
        return parts[0]
    wanted = part or role
    synonyms = next((names for names in _SYNONYMS if wanted.lower() in names), ())
    stand_ins = _SYNONYMS[1] if part is None and wanted == "test" else ()
    stems = Counter(
        name.lower().rstrip("0123456789") for name in parts
    )  # "val2017", where there is no other val
    by_name = {stem: name for name in parts if stems[stem := name.lower().rstrip("0123456789")] == 1}
    by_name |= {name.lower(): name for name in parts} | {name: name for name in parts}
    for name in (wanted, wanted.lower(), *synonyms, *stand_ins):
        if name in by_name:
            return by_name[name]
    listed = ", ".join(f"#{name}" for name in parts if name)
    if not listed:
        raise DataError(f"{place} has no splits, so there is no #{part}", hint=f"leave #{part} out")
    if part is not None:
        suggestion = did_you_mean(f"#{part}", [f"#{name}" for name in parts])
        guess = f"; {suggestion}" if suggestion else ""
        raise DataError(f"{place} has no split {part!r}", hint=f"its splits: {listed}{guess}")
    hold_out = f"{place}#train with --holdout 2%"
    instead = f", or hold some out: {hold_out}" if role == "val" and "train" in parts else ""
    raise DataError(f"{place} has no {role} split", hint=f"name one of its splits: {listed}{instead}")


def part_files(place: str, suffixes: Sequence[str], pick: Pick) -> list[Path]:
    """Return the files of one part: those in a folder `test`, or whose names begin with `test`; else all.

    Args:
        place: a folder, a file, or several as `expand` reads them.

    Raises:
        DataError: some of several files are not there.
    """
    roots = expand(place)
    missing = [str(root) for root in roots if not root.exists()]
    if missing:
        raise DataError(
            f"{place}: {len(missing)} of {len(roots)} files are not there: {and_more(missing, 3)}",
            hint="a range is written {0000..0099}, several files as a.tar::b.tar; download what is on the web first",
        )
    parts: dict[str, list[Path]] = {"": [root for root in roots if root.is_file()]}
    for root in roots:
        for path in sorted(p for pattern in ("*", "*/*") for p in root.glob(pattern) if p.is_file()):
            if path.name.lower().endswith(tuple(suffixes)):
                below = path.parent.name if path.parent != root else ""
                word = re.split("[-_.0-9]", path.name)[0]
                name = next((name for name in (below, word) if is_part(name)), "")
                parts.setdefault(name, []).append(path)
    return parts[pick(sorted(name for name, paths in parts.items() if paths) or [""])]


def expand(place: str) -> list[Path]:
    """Return the paths that `a.tar::b.tar` and `{0000..0099}.tar` stand for; a path that exists stands for itself.

    Raises:
        DataError: they are too many to be meant.
    """
    if Path(place).exists():
        return [Path(place)]
    paths = list(islice((path for text in place.split("::") for path in _braces(text)), _MOST_FILES + 1))
    if len(paths) > _MOST_FILES:
        raise DataError(
            f"{place} stands for more than {_MOST_FILES} files", hint="name fewer, as in {0000..0099}.tar"
        )
    return [Path(path) for path in paths]


def _braces(text: str) -> Iterator[str]:
    match = re.search(r"\{(?:([0-9]+)\.\.([0-9]+)|([^{}]*,[^{}]*))\}", text)
    if match is None:
        yield text
        return
    first, last, listed = match.groups()
    if listed is None:
        width = max(map(len, (first, last))) if first.startswith("0") or last.startswith("0") else 0
        words: Iterable[str] = (f"{number:0{width}d}" for number in range(int(first), int(last) + 1))
    else:
        words = listed.split(",")
    for word in words:
        yield from _braces(text[: match.start()] + word + text[match.end() :])


def relative_names(paths: Sequence[Path]) -> list[str]:
    """Return paths as seen from the folder that all of them lie in, so that they are the same on every machine."""
    common = Path(os.path.commonpath([path.absolute().parent for path in paths]))
    return [path.absolute().relative_to(common).as_posix() for path in paths]
