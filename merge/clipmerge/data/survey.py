"""Read every image of a split once before it is used: which cannot be opened, and a digest of each one's content.

The result is remembered by the files' paths, sizes and times, so that unchanged files are not read again.
"""

import io
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from blake3 import blake3
from PIL import Image

from clipmerge.checkpoint.cache import cache_dir
from clipmerge.checkpoint.output import whole_file
from clipmerge.data.stored import StoredImages, content_key, decode
from clipmerge.errors import DataError, OutputError
from clipmerge.text import and_more
from clipmerge.types import Bytes, Ints, Progress

_CHUNK, _REPORT = 8, 64

__all__ = ["Survey", "Unusable", "in_threads", "refuse", "survey", "why_unreadable"]


@dataclass(frozen=True, slots=True)
class Unusable:
    """An item, or a class, that cannot be used, and why."""

    item: str
    reason: str

    def __str__(self) -> str:
        return f"{self.item}: {self.reason}"


@dataclass(frozen=True, slots=True)
class Survey:
    """What was seen of n images.

    Attributes:
        keys: (n, 32) digests of what is stored; zeros for images that cannot be read.
        unreadable: by position, why an image cannot be opened.
    """

    keys: Bytes
    unreadable: dict[int, str]


def refuse(source: str, unusable: Sequence[Unusable]) -> None:
    """Raise one DataError that counts the items and names the first ten; do nothing where there are none."""
    if unusable:
        count = "1 item" if len(unusable) == 1 else f"{len(unusable)} items"
        lines = and_more(list(map(str, unusable)), 10, "\n  ")
        raise DataError(
            f"{source}: {count} cannot be used\n  {lines}",
            hint="put them right, or leave them out with --skip-bad (skip_bad=True)",
        )


def survey(
    images: StoredImages, index: Ints, *, fully: bool = False, on_progress: Progress | None = None
) -> Survey:
    """Read the images at `index` once: check their headers, or `fully` decode them, and digest their content."""
    path = _cache_path(images, index, fully)
    known = None if path is None else _read_cache(path, len(index))
    if known is not None:
        return known
    keys, unreadable = np.zeros((len(index), 32), np.uint8), dict[int, str]()

    def look(position: int) -> None:
        try:
            stored = images.fetch(int(index[position]))
            if fully:
                decode(stored)
            elif isinstance(stored, bytes):
                Image.open(io.BytesIO(stored)).close()
            keys[position] = np.frombuffer(content_key(stored), np.uint8)
        except Exception as error:  # Pillow's decoders raise anything from SyntaxError to struct.error
            unreadable[position] = why_unreadable(error)

    in_threads(look, len(index), 8, "checking images", on_progress)
    if path is not None:
        content = keys.tobytes() + json.dumps(unreadable).encode()
        with suppress(OutputError), whole_file(path, parents=True) as sibling:  # a full disk only costs time
            sibling.write_bytes(content + blake3(content).digest())
    return Survey(keys, unreadable)


def in_threads(
    work: Callable[[int], None], count: int, threads: int, what: str, on_progress: Progress | None
) -> None:
    """Call `work` for 0 … count - 1 in threads, a few at a time, and report progress now and then."""

    def chunk(start: int) -> int:
        end = min(start + _CHUNK, count)
        for i in range(start, end):
            work(i)
        return end

    with ThreadPoolExecutor(threads) as pool:
        for done in pool.map(chunk, range(0, count, _CHUNK)):
            if on_progress is not None and (done % _REPORT == 0 or done == count):
                on_progress(what, done, count)


def why_unreadable(error: Exception) -> str:
    """Return a few words without a path: paths are the item's own name."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if type(error).__name__ == "UnidentifiedImageError":
        return "not an image"
    return str(error) or type(error).__name__


def _cache_path(images: StoredImages, index: Ints, fully: bool) -> Path | None:
    """Return where a survey of files that look like these is kept; None where some images are in no file."""
    hasher = blake3(b"clipmerge survey 1 fully" if fully else b"clipmerge survey 1")
    for i in index.tolist():
        stamp = images.stamp(i)
        if stamp is None:
            return None
        hasher.update(f"{stamp}\n".encode())
    return cache_dir() / "images" / f"{hasher.hexdigest()}.survey"


def _read_cache(path: Path, count: int) -> Survey | None:
    """Return a survey from its file: keys, reasons as JSON, and a digest of both."""
    with suppress(OSError, ValueError):
        raw = path.read_bytes()
        content = raw[:-32]
        if blake3(content).digest() == raw[-32:]:
            reasons = json.loads(content[32 * count :])
            keys = np.frombuffer(content[: 32 * count], np.uint8).reshape(-1, 32)
            return Survey(keys, {int(i): reason for i, reason in reasons.items()})
    return None
