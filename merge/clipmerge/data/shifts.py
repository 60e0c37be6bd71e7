"""Shifts that keep labels meaningful: the same change for the same item's name on every machine."""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from blake3 import blake3
from PIL import Image, ImageChops, ImageEnhance, ImageFilter

from clipmerge.errors import DataError
from clipmerge.text import did_you_mean

__all__ = ["SHIFTS", "Shift", "ShiftKind", "parse_shift"]


@dataclass(frozen=True, slots=True)
class ShiftKind:
    """A change of an RGB image by a value in [low, high], with a seed that only noise uses."""

    change: Callable[[Image.Image, float, int], Image.Image]
    default: float
    low: float
    high: float
    meaning: str


def _noise(image: Image.Image, deviation: float, seed: int) -> Image.Image:
    pixels = np.asarray(image, np.float64)
    drawn = np.random.Generator(np.random.Philox(seed)).normal(0.0, 255 * deviation, pixels.shape)
    return Image.fromarray(np.clip(np.rint(pixels + drawn), 0, 255).astype(np.uint8))


def _pixelate(image: Image.Image, factor: float, seed: int) -> Image.Image:
    width, height = (max(1, round(side / factor)) for side in image.size)
    coarse = image.resize((width, height), Image.Resampling.BOX)
    return coarse.resize(image.size, Image.Resampling.NEAREST)


def _jpeg(image: Image.Image, quality: float, seed: int) -> Image.Image:
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=round(quality))
    return Image.open(encoded).convert("RGB")


SHIFTS: Mapping[str, ShiftKind] = {
    "rotate": ShiftKind(
        lambda image, degrees, _: image.rotate(degrees, Image.Resampling.BICUBIC),
        20, -45, 45, "degrees, counter-clockwise",
    ),
    "invert": ShiftKind(lambda image, *_: ImageChops.invert(image), 1, 1, 1, "no value"),
    "blur": ShiftKind(
        lambda image, sigma, _: image.filter(ImageFilter.GaussianBlur(sigma)),
        1, 0, 100, "standard deviation in pixels of the stored image",
    ),
    "noise": ShiftKind(_noise, 0.2, 0, 1, "standard deviation, white is 1"),
    "contrast": ShiftKind(
        lambda image, factor, _: ImageEnhance.Contrast(image).enhance(factor), 0.4, 0.05, 20, "factor"
    ),
    "brightness": ShiftKind(
        lambda image, factor, _: ImageEnhance.Brightness(image).enhance(factor), 0.4, 0.05, 20, "factor"
    ),
    "gray": ShiftKind(lambda image, *_: image.convert("L").convert("RGB"), 1, 1, 1, "no value"),
    "pixelate": ShiftKind(_pixelate, 2, 1, 100, "how many times smaller"),
    "jpeg": ShiftKind(_jpeg, 10, 1, 95, "quality"),
}  # fmt: skip
"""Name → kind. Values are bounded so that labels stay meaningful: a 6 turned by 180° is a 9."""


@dataclass(frozen=True, slots=True)
class Shift:
    """One of `SHIFTS` with its value."""

    name: str
    value: float

    def __str__(self) -> str:
        return f"{self.name}:{self.value:g}"

    def apply(self, image: Image.Image, item: str) -> Image.Image:
        """Return the changed image; what is random in it follows from the item's name."""
        return SHIFTS[self.name].change(image, self.value, self._seed(item)).convert("RGB")

    def key(self, key: bytes, item: str) -> bytes:
        """Return the content key of the changed image, from the key of the image that it is made of."""
        return blake3(f"{self}\0{self._seed(item)}\0".encode() + key).digest()

    def _seed(self, item: str) -> int:
        return int.from_bytes(blake3(f"{self}\0{item}".encode()).digest(8), "little")


def parse_shift(text: str) -> Shift:
    """Parse "rotate:20", or "rotate" for its default value.

    Raises:
        DataError: no such shift, or a value out of bounds.
    """
    name, _, raw = text.partition(":")
    if name not in SHIFTS:
        hint = did_you_mean(name, SHIFTS, f"shifts: {', '.join(SHIFTS)}")
        raise DataError(f"there is no shift {name!r}", hint=hint)
    kind = SHIFTS[name]
    try:
        value = float(raw) if raw else kind.default
    except ValueError:
        value = float("nan")
    if not kind.low <= value <= kind.high:
        raise DataError(
            f"{raw!r} is not a value for the shift {name!r}",
            hint=f"{name} takes {kind.low:g} … {kind.high:g} ({kind.meaning}); "
            f"{kind.default:g} where none is given",
        )
    return Shift(name, value)
