"""Stored images: the ways in which they lie on disk or in memory, what they decode to, and digests of their content."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from blake3 import blake3
from PIL import Image

from clipmerge.types import Bytes

__all__ = ["FileImages", "LoadedImages", "Stored", "StoredImages", "content_key", "decode", "file_stamp"]

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
