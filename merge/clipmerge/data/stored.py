"""Stored images: the ways in which they lie on disk or in memory, what they decode to, and digests of their content."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from blake3 import blake3
from PIL import Image

from clipmerge.types import Bytes

__all__ = [
    "ArrayImages",
    "DatasetImages",
    "FileImages",
    "Stored",
    "StoredImages",
    "content_key",
    "decode",
    "file_stamp",
]

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
    """Return the image in RGB, as torchvision's loader makes it: no alpha, no EXIF rotation, no draft mode."""
    if isinstance(stored, bytes):
        with Image.open(io.BytesIO(stored)) as image:
            if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
                return image.convert("RGBA").convert("RGB")  # the same pixels, without Pillow's warning
            return image.convert("RGB")
    return (stored if isinstance(stored, Image.Image) else Image.fromarray(stored)).convert("RGB")


def content_key(stored: Stored) -> bytes:
    """Return a digest (32 bytes) of an image's content: of its bytes where it is encoded, else of its pixels."""
    if isinstance(stored, bytes):
        return blake3(stored).digest()
    if isinstance(stored, Image.Image):
        rgb = stored.convert("RGB")
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
    """Encoded images that are files, or runs of bytes (offset, size) in files: members of tar archives."""

    paths: Sequence[str]
    runs: Sequence[tuple[int, int]] | None = None

    def fetch(self, i: int) -> bytes:
        if self.runs is None:
            return Path(self.paths[i]).read_bytes()
        offset, size = self.runs[i]
        with Path(self.paths[i]).open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def stamp(self, i: int) -> str:
        where = "" if self.runs is None else self.runs[i]
        return f"{file_stamp(self.paths[i])}\0{where}"


@dataclass(frozen=True, slots=True)
class ArrayImages:
    """Images in one array: decoded, (n, height, width[, 3]); or encoded ones end to end, cut at `offsets` (n + 1)."""

    data: Bytes
    offsets: npt.NDArray[np.int64] | None = None

    def fetch(self, i: int) -> Stored:
        if self.offsets is None:
            pixels: Bytes = self.data[i]
            return pixels
        return self.data[int(self.offsets[i]) : int(self.offsets[i + 1])].tobytes()

    def stamp(self, i: int) -> None:
        return None


@dataclass(frozen=True, slots=True)
class DatasetImages:
    """A map-style data set of (image, label) pairs, as torchvision has them."""

    pairs: Any

    def fetch(self, i: int) -> Image.Image:
        image: Image.Image = self.pairs[i][0]
        return image

    def stamp(self, i: int) -> None:
        return None
