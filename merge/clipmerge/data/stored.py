"""Stored images: how they lie on disk or in memory, what they decode to, and a digest of each one's content.

`survey` reads every image of a split once before it is used; the result is remembered by the files' paths, sizes and
times, so that unchanged files are not read again.
"""

import io
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from blake3 import blake3
from PIL import Image, UnidentifiedImageError

from clipmerge.checkpoint.cache import cache_dir
from clipmerge.checkpoint.output import whole_file
from clipmerge.errors import DataError, OutputError
from clipmerge.text import and_more
from clipmerge.types import Bytes, Ints, Progress

__all__ = [
    "FileImages", "LoadedImages", "Stored", "StoredImages", "content_key", "decode", "file_stamp",
    "map_intact", "read_each", "refuse", "survey",
]  # fmt: skip

_CHUNK, _REPORT = 8, 64

Stored = bytes | Bytes | Image.Image
"""Encoded bytes (JPEG, PNG …); a decoded array, (height, width) grey or (height, width, 3); or Pillow's image."""


class StoredImages(Protocol):
    """Numbered images that several threads may read at once.

    A source pickles without open files and without what it can read again, so that worker processes may have it.
    """

    def fetch(self, i: int) -> Stored:
        """Return image `i` as it is stored."""

    def stamp(self, i: int) -> str | None:
        """Return what changes when the image's file does, without reading it; None where there is no file."""


def decode(stored: Stored) -> Image.Image:
    """Return the image in RGB, as torchvision's loader makes it: no alpha, no EXIF rotation, no draft mode.

    Deeper grey images, which that loader clips, are scaled: 16 bits by their white, floats in 0 … 1 by 255.

    Raises:
        ValueError: a mode whose white is not known.
    """
    if isinstance(stored, bytes):
        with Image.open(io.BytesIO(stored)) as image:
            return _rgb(image)
    return _rgb(stored if isinstance(stored, Image.Image) else Image.fromarray(stored))


def _rgb(image: Image.Image) -> Image.Image:
    if _is_deep(image):
        values = np.asarray(image)
        if image.mode == "F":
            if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
                span = f"{values.min():g} to {values.max():g}"
                raise ValueError(f"mode F with values from {span}, not in 0 … 1: save it in 8 or 16 bits")
            white: float = 1
        elif image.mode == "I" and image.format not in _SIXTEEN_BITS:
            raise ValueError("mode I, 32-bit integers without a known white: save it in 8 or 16 bits")
        else:  # a TIFF may have 12 bits in 16
            white = 2 ** int(getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (16,))[0]) - 1
        return Image.fromarray(np.rint(values * (255.0 / white)).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        return image.convert("RGBA").convert("RGB")  # the same pixels, without Pillow's warning
    return image.convert("RGB")


_SIXTEEN_BITS = ("PNG", "PPM")
"""Formats whose deepest pixels have 16 bits, which releases of Pillow give as mode I."""

_BITS_PER_SAMPLE = 258
_MAYBE_DEEP = (b"\x89PNG", b"II", b"MM", b"P5", b"P2", b"Pf", b"\0\0\0\x0cjP", b"\xff\x4f")


def _is_deep(image: Image.Image) -> bool:
    return image.mode in ("I", "F") or image.mode.startswith("I;16")


def content_key(stored: Stored) -> bytes:
    """Return a digest (32 bytes) of an image's content: of its bytes where it is encoded, else of its pixels.

    Deep images were clipped once: a word in front tells what was remembered of them then from what they are now.
    """
    if isinstance(stored, bytes):
        deep = False
        if stored.startswith(_MAYBE_DEEP):
            with (
                suppress(Exception),
                Image.open(io.BytesIO(stored)) as image,
            ):  # what is no image is told by others
                deep = _is_deep(image)
        return blake3(b"scaled\0" + stored if deep else stored).digest()
    if isinstance(stored, Image.Image):
        rgb = decode(stored)
        return blake3(repr(rgb.size).encode() + rgb.tobytes()).digest()
    return blake3(repr(stored.shape).encode() + stored.tobytes()).digest()


def file_stamp(path: str) -> str:
    """Return a file's path, size and time, or why it has none."""
    try:
        status = Path(path).stat()
    except OSError as error:
        return f"{path}\0{error.strerror}"
    return f"{Path(path).absolute()}\0{status.st_size}\0{status.st_mtime_ns}"


@dataclass(frozen=True, slots=True)
class FileImages:
    """Encoded images that are files, or lie in files that are opened for each of them: archives, tables.

    Attributes:
        paths: for each image its file.
        read, where: how to read an image out of a file (a function of a module, so that it pickles), and for each
            image where in its file it is.
    """

    paths: Sequence[str]
    read: Callable[[str, Any], bytes] | None = None
    where: Sequence[Any] = ()

    def fetch(self, i: int) -> bytes:
        if self.read is None:
            return Path(self.paths[i]).read_bytes()
        return self.read(self.paths[i], self.where[i])

    def stamp(self, i: int) -> str:
        return f"{file_stamp(self.paths[i])}\0{self.where[i] if self.where else ''}"


@dataclass(frozen=True, slots=True)
class LoadedImages:
    """Images in memory: an array of them, a list, or a data set of (image, label) pairs as torchvision has them."""

    images: Any

    def fetch(self, i: int) -> Stored:
        stored: Any = self.images[i]
        return stored[0] if isinstance(stored, tuple) else stored  # type: ignore[no-any-return]

    def stamp(self, i: int) -> None:
        return None


def refuse(source: str, unusable: Sequence[str]) -> None:
    """Raise one DataError that counts the items ("item: reason") and names the first ten, if there are any."""
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
    distinct, places = np.unique(index, return_inverse=True)
    if len(distinct) < len(index):  # an image with several captions is read once
        keys, faults = survey(images, distinct, fully=fully, on_progress=on_progress)
        return keys[places], {i: faults[p] for i, p in enumerate(places.tolist()) if p in faults}
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
    hasher = blake3(b"clipmerge survey 2 fully" if fully else b"clipmerge survey 2")
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
