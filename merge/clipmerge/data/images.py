"""Where images come from: one protocol, and the few ways in which bytes lie."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from blake3 import blake3
from PIL import Image

Bytes = npt.NDArray[np.uint8]


class Images(Protocol):
    """Numbered images that can be read from several threads at once."""

    def __len__(self) -> int: ...

    def image(self, i: int) -> Image.Image:
        """Decoded, RGB."""

    def read_bytes(self, i: int) -> bytes | None:
        """The encoded bytes as they are stored, None where there are none."""

    def key(self, i: int) -> bytes:
        """A digest of the content."""

    def stamp(self, i: int) -> str | None:
        """What changes when the content may have (path, size, time), cheaper than `key`; None in memory."""

    def glance(self, i: int) -> None:
        """Reads the header only; raises where it is not an image's."""


def decode(encoded: bytes) -> Image.Image:
    """The image in RGB, as torchvision's loader makes it: no alpha, no EXIF rotation, no draft mode."""
    with Image.open(io.BytesIO(encoded)) as image:
        if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
            return image.convert("RGBA").convert("RGB")  # the same pixels, without Pillow's warning
        return image.convert("RGB")


@dataclass(frozen=True, slots=True)
class InFiles:
    """Each image is a run of bytes in a file: a whole file, or a member of a tar archive (offset, size)."""

    paths: Sequence[Path]
    ranges: Sequence[tuple[int, int]] | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, i: int) -> Image.Image:
        return decode(self.read_bytes(i))

    def read_bytes(self, i: int) -> bytes:
        if self.ranges is None:
            return self.paths[i].read_bytes()
        offset, size = self.ranges[i]
        with self.paths[i].open("rb") as file:
            file.seek(offset)
            return file.read(size)

    def key(self, i: int) -> bytes:
        return blake3(self.read_bytes(i)).digest()

    def stamp(self, i: int) -> str:
        status = self.paths[i].stat()
        where = "" if self.ranges is None else self.ranges[i]
        return f"{self.paths[i].absolute()}\0{where}\0{status.st_size}\0{status.st_mtime_ns}"

    def glance(self, i: int) -> None:
        with Image.open(self.paths[i] if self.ranges is None else io.BytesIO(self.read_bytes(i))):
            pass


@dataclass(frozen=True, slots=True)
class Encoded:
    """Encoded images behind a function from the number to the bytes."""

    count: int
    fetch: Callable[[int], bytes]
    stamp_of: Callable[[int], str] | None = None

    def __len__(self) -> int:
        return self.count

    def image(self, i: int) -> Image.Image:
        return decode(self.fetch(i))

    def read_bytes(self, i: int) -> bytes:
        return self.fetch(i)

    def key(self, i: int) -> bytes:
        return blake3(self.fetch(i)).digest()

    def stamp(self, i: int) -> str | None:
        return None if self.stamp_of is None else self.stamp_of(i)

    def glance(self, i: int) -> None:
        with Image.open(io.BytesIO(self.fetch(i))):
            pass


@dataclass(frozen=True, slots=True)
class Decoded:
    """Decoded images: uint8, (n, H, W) grey or (n, H, W, 3)."""

    pixels: Bytes

    def __len__(self) -> int:
        return len(self.pixels)

    def image(self, i: int) -> Image.Image:
        return Image.fromarray(self.pixels[i]).convert("RGB")

    def read_bytes(self, i: int) -> None:
        return None

    def key(self, i: int) -> bytes:
        return blake3(repr(self.pixels[i].shape).encode() + self.pixels[i].tobytes()).digest()

    def stamp(self, i: int) -> None:
        return None

    def glance(self, i: int) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Indexed:
    """Images that a function decodes: torchvision's data sets."""

    count: int
    fetch: Callable[[int], Image.Image]

    def __len__(self) -> int:
        return self.count

    def image(self, i: int) -> Image.Image:
        return self.fetch(i).convert("RGB")

    def read_bytes(self, i: int) -> None:
        return None

    def key(self, i: int) -> bytes:
        image = self.image(i)
        return blake3(repr(image.size).encode() + image.tobytes()).digest()

    def stamp(self, i: int) -> None:
        return None

    def glance(self, i: int) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Picked:
    """Some images of others, in the order of `indices`."""

    images: Images
    indices: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.indices)

    def image(self, i: int) -> Image.Image:
        return self.images.image(int(self.indices[i]))

    def read_bytes(self, i: int) -> bytes | None:
        return self.images.read_bytes(int(self.indices[i]))

    def key(self, i: int) -> bytes:
        return self.images.key(int(self.indices[i]))

    def stamp(self, i: int) -> str | None:
        return self.images.stamp(int(self.indices[i]))

    def glance(self, i: int) -> None:
        self.images.glance(int(self.indices[i]))


@dataclass(frozen=True, slots=True)
class Changed:
    """Images that each go through a function of the image and a seed made from the item's name."""

    images: Images
    names: Sequence[str]
    change: Callable[[Image.Image, int], Image.Image]
    text: str

    def __len__(self) -> int:
        return len(self.images)

    def image(self, i: int) -> Image.Image:
        return self.change(self.images.image(i), self._seed(i)).convert("RGB")

    def read_bytes(self, i: int) -> None:
        return None

    def key(self, i: int) -> bytes:
        return blake3(f"{self.text}\0{self._seed(i)}\0".encode() + self.images.key(i)).digest()

    def stamp(self, i: int) -> str | None:
        below = self.images.stamp(i)
        return None if below is None else f"{self.text}\0{self._seed(i)}\0{below}"

    def glance(self, i: int) -> None:
        self.images.glance(i)

    def _seed(self, i: int) -> int:
        return int.from_bytes(blake3(f"{self.text}\0{self.names[i]}".encode()).digest(8), "little")


def slices(blob: Bytes, offsets: npt.NDArray[Any]) -> Callable[[int], bytes]:
    """Number → the bytes between two offsets of one array."""

    def fetch(i: int) -> bytes:
        return blob[int(offsets[i]) : int(offsets[i + 1])].tobytes()

    return fetch
