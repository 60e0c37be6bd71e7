"""Every mode of an image becomes RGB with its white at 255, or is refused by name; nothing is clipped."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clipmerge.data.open import open_split
from clipmerge.data.pixels import pixels
from clipmerge.data.stored import content_key, decode
from clipmerge.errors import DataError

from .conftest import encoded, picture, store

RAMP = np.arange(256, dtype=np.uint16).reshape(16, 16)
CFG: dict[str, Any] = {"size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}


def grey(image: Image.Image) -> Any:
    """One channel of an image that is grey."""
    channels = np.asarray(image)
    assert (channels == channels[..., :1]).all()
    return channels[..., 0]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_sixteen_bits_are_scaled_by_their_white(kind: str) -> None:
    assert np.array_equal(grey(decode(encoded(Image.fromarray(RAMP * 257), kind))), RAMP)
    deepest = np.array([[0, 128, 129, 65535]], np.uint16)
    assert grey(decode(encoded(Image.fromarray(deepest), "PNG"))).tolist() == [[0, 0, 1, 255]]


def test_twelve_bits_of_a_tiff_are_scaled_by_their_own_white() -> None:
    image = Image.fromarray(np.array([[0, 4095, 2048, 0]], np.uint16))

    twelve = Image.fromarray(np.asarray(image))
    twelve.tag_v2 = {258: (12,)}  # type: ignore[attr-defined]
    assert grey(decode(twelve)).tolist() == [[0, 255, 128, 0]]


def test_big_endian_sixteen_bits() -> None:
    image = Image.new("I;16B", (2, 1))
    image.putpixel((1, 0), 65535)
    assert grey(decode(image)).tolist() == [[0, 255]]


def test_floats_from_0_to_1_are_scaled() -> None:
    floats = Image.fromarray((RAMP / 255).astype(np.float32))
    assert np.array_equal(grey(decode(encoded(floats, "TIFF"))), RAMP)


@pytest.mark.parametrize(
    ("array", "why"),
    [
        (np.array([[0.0, 255.0]], np.float32), "mode F with values from 0 to 255, not in 0 … 1"),
        (np.array([[-0.1, 0.5]], np.float32), "mode F with values from -0.1 to 0.5"),
        (np.array([[np.nan, 0.5]], np.float32), "mode F"),
        (np.array([[0, 70000]], np.int32), "mode I, 32-bit integers without a known white"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "csv", "webdataset", "npz", "parquet"])
def test_what_has_no_white_is_refused_by_name(array: Any, why: str, kind: str, tmp_path: Path) -> None:
    bad = encoded(Image.fromarray(array), "TIFF")
    source = store(kind, tmp_path / "s", ["cat", "dog", "cat"], images=[picture(0), picture(1), bad])
    with pytest.raises(DataError, match=why):
        pixels(open_split(source), CFG, cache=tmp_path / "c")
    split = open_split(source, skip_bad=True)
    assert len(split) == 2
    assert why in split.skipped[0]


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("1", "PNG"), ("L", "PNG"), ("LA", "PNG"), ("P", "PNG"), ("RGB", "PNG"), ("RGBA", "PNG"), ("CMYK", "TIFF"),
        ("YCbCr", "TIFF"), ("PA", None), ("RGBX", None), ("HSV", None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", [0, 255])
def test_black_and_white_are_that_in_every_mode(mode: str, kind: str | None, value: int) -> None:
    image = Image.new("RGB", (8, 8), (value,) * 3)
    image = image.convert("P").convert("PA") if mode == "PA" else image.convert(mode)
    shown = decode(image if kind is None else encoded(image, kind))
    assert (np.asarray(shown) == value).all()


def test_a_deep_image_is_not_taken_for_the_clipped_one_that_was_remembered() -> None:
    from blake3 import blake3

    deep, plain = encoded(Image.fromarray(RAMP * 257), "PNG"), encoded(picture(0), "PNG")
    assert content_key(deep) != blake3(deep).digest()
    assert content_key(plain) == blake3(plain).digest()
