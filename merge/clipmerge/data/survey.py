"""Read every image of a split once before it is used: which cannot be opened, and a digest of each one's content.

The result is remembered by the files' paths, sizes and times, so that unchanged files are not read again.
"""

import io
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
from blake3 import blake3
from PIL import Image, UnidentifiedImageError

from clipmerge.checkpoint.cache import cache_dir
from clipmerge.checkpoint.output import whole_file
from clipmerge.data.stored import StoredImages, content_key, decode
from clipmerge.errors import DataError, OutputError
from clipmerge.text import and_more
from clipmerge.types import Bytes, Ints, Progress

_CHUNK, _REPORT = 8, 64

__all__ = ["map_intact", "read_each", "refuse", "survey"]


def refuse(source: str, unusable: Sequence[str]) -> None:
    """Raise one DataError that counts the items ("item: reason") and names the first ten; not where there are none."""
    if unusable:
        count = "1 item" if len(unusable) == 1 else f"{len(unusable)} items"
        raise DataError(
            f"{source}: {count} cannot be used\n  {and_more(unusable, 10, chr(10) + '  ')}",
            hint="put them right, or leave them out with --skip-bad (skip_bad=True)",
        )


def survey(
    images: StoredImages, index: Ints, *, fully: bool = False, on_progress: Progress | None = None
) -> tuple[Bytes, dict[int, str]]:
    """Read the images at `index` once: check their headers, or `fully` decode them, and digest their content.

    Returns:
        (n, 32) digests of what is stored, zeros for images that cannot be read; and by position why those cannot.
    """
    path, size = _cache_path(images, index, fully), 32 * len(index)
    cached = None if path is None else map_intact(path)
    if cached is not None:
        reasons = {int(i): reason for i, reason in json.loads(cached[size:].tobytes()).items()}
        return np.array(cached[:size]).reshape(-1, 32), reasons
    keys = np.zeros((len(index), 32), np.uint8)

    def look(position: int) -> bytes:
        stored = images.fetch(int(index[position]))
        if fully:
            decode(stored)
        elif isinstance(stored, bytes):
            Image.open(io.BytesIO(stored)).close()
        return content_key(stored)

    def note(position: int, key: bytes) -> None:
        keys[position] = np.frombuffer(key, np.uint8)

    reasons = read_each(look, note, len(index), 8, "checking images", on_progress)
    if path is not None:
        content = keys.tobytes() + json.dumps(reasons).encode()
        with suppress(OutputError), whole_file(path, parents=True) as sibling:  # a full disk only costs time
            sibling.write_bytes(content + blake3(content).digest())
    return keys, reasons


def read_each(
    read: Callable[[int], bytes],
    write: Callable[[int, bytes], object],
    count: int,
    threads: int,
    what: str,
    on_progress: Progress | None,
) -> dict[int, str]:
    """Read images 0 … count - 1 in threads, and write what was read of each. Returns why some cannot be read, in order.

    What `write` raises (a full disk) is no fault of the image's and is raised.
    """
    reasons: dict[int, str] = {}

    def chunk(start: int) -> int:
        end = min(start + _CHUNK, count)
        for i in range(start, end):
            try:
                row = read(i)
            except Exception as error:  # Pillow's decoders raise anything from SyntaxError to struct.error
                reasons[i] = _reason(error)
            else:
                write(i, row)
        return end

    with ThreadPoolExecutor(threads) as pool:
        for done in pool.map(chunk, range(0, count, _CHUNK)):
            if on_progress is not None and (done % _REPORT == 0 or done == count):
                on_progress(what, done, count)
    return dict(sorted(reasons.items()))


def _reason(error: Exception) -> str:
    """Return a few words without a path: paths are the item's own name."""
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return "not an image" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__


def _cache_path(images: StoredImages, index: Ints, fully: bool) -> Path | None:
    """Return where a survey of files that look like these is kept; None where some images are in no file."""
    hasher = blake3(b"clipmerge survey 1 fully" if fully else b"clipmerge survey 1")
    for i in index.tolist():
        stamp = images.stamp(i)
        if stamp is None:
            return None
        hasher.update(f"{stamp}\n".encode())
    return cache_dir() / "images" / f"{hasher.hexdigest()}.survey"


def map_intact(path: Path) -> Bytes | None:
    """Map a cached file, copy-on-write; None where it is absent or its last 32 bytes are not a digest of the others."""
    try:
        data = np.memmap(path, np.uint8, mode="c")
    except (OSError, ValueError):
        return None
    content = data[:-32]
    intact = blake3(content.data, max_threads=blake3.AUTO).digest() == data[-32:].tobytes()
    return content if intact else None
