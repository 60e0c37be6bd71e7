"""Small real images, as files and as bytes, in every mode that data sets hold."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    """A smooth coloured picture that differs for every seed."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin((x * (seed % 5 + 1) + y * c + 7 * seed) / (6.0 + c)) for c in range(3)]
    return Image.fromarray(np.stack([127.5 + 127.5 * w for w in waves], -1).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG") -> bytes:
    """The image as the bytes of a file."""
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


MakeFolder = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> MakeFolder:
    """folder(cat=3, dog=2, root="photos") → a folder of class folders with so many JPEGs."""

    def make(root: str = "photos", **classes: int) -> Path:
        for c, (name, count) in enumerate(classes.items()):
            (tmp_path / root / name).mkdir(parents=True)
            for i in range(count):
                picture(10 * c + i).save(tmp_path / root / name / f"{i}.jpg")
        return tmp_path / root

    return make
