"""Shifts that keep labels meaningful: the same change for the same item's name on every machine."""

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageChops, ImageEnhance, ImageFilter

from clipmerge.data.images import Changed
from clipmerge.errors import DataError
from clipmerge.text import nearest

if TYPE_CHECKING:
    from clipmerge.data.split import Split


@dataclass(frozen=True, slots=True)
class Shift:
    """A change of an RGB image by a value in [low, high], with a seed that only noise uses."""

    change: Callable[[Image.Image, float, int], Image.Image]
    default: float
    low: float
    high: float
    meaning: str


def _rotate(image: Image.Image, degrees: float, seed: int) -> Image.Image:
    return image.rotate(degrees, Image.Resampling.BICUBIC)


def _invert(image: Image.Image, value: float, seed: int) -> Image.Image:
    return ImageChops.invert(image)


def _blur(image: Image.Image, sigma: float, seed: int) -> Image.Image:
    return image.filter(ImageFilter.GaussianBlur(sigma))


def _noise(image: Image.Image, deviation: float, seed: int) -> Image.Image:
    pixels = np.asarray(image, np.float64)
    drawn = np.random.Generator(np.random.Philox(seed)).normal(0.0, 255 * deviation, pixels.shape)
    return Image.fromarray(np.clip(np.rint(pixels + drawn), 0, 255).astype(np.uint8))


def _contrast(image: Image.Image, factor: float, seed: int) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(factor)


def _brightness(image: Image.Image, factor: float, seed: int) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(factor)


def _gray(image: Image.Image, value: float, seed: int) -> Image.Image:
    return image.convert("L").convert("RGB")


def _pixelate(image: Image.Image, factor: float, seed: int) -> Image.Image:
    small = tuple(max(1, round(side / factor)) for side in image.size)
    coarse = image.resize((small[0], small[1]), Image.Resampling.BOX)
    return coarse.resize(image.size, Image.Resampling.NEAREST)


def _jpeg(image: Image.Image, quality: float, seed: int) -> Image.Image:
    encoded = io.BytesIO()
    image.save(encoded, "JPEG", quality=round(quality))
    return Image.open(encoded).convert("RGB")


SHIFTS: Mapping[str, Shift] = {
    "rotate": Shift(_rotate, 20, -45, 45, "degrees, counter-clockwise"),
    "invert": Shift(_invert, 1, 1, 1, "no value"),
    "blur": Shift(_blur, 1, 0, 100, "standard deviation in pixels of the stored image"),
    "noise": Shift(_noise, 0.2, 0, 1, "standard deviation, white is 1"),
    "contrast": Shift(_contrast, 0.4, 0.05, 20, "factor"),
    "brightness": Shift(_brightness, 0.4, 0.05, 20, "factor"),
    "gray": Shift(_gray, 1, 1, 1, "no value"),
    "pixelate": Shift(_pixelate, 2, 1, 100, "how many times smaller"),
    "jpeg": Shift(_jpeg, 10, 1, 95, "quality"),
}
"""Name → shift. Values are bounded so that labels stay meaningful: a 6 turned by 180° is a 9."""


def parse_shift(text: str) -> tuple[Shift, float]:
    """ "rotate:20" → the shift and its value.

    Raises:
        DataError: no such shift, or a value out of bounds.
    """
    name, _, raw = text.partition(":")
    if name not in SHIFTS:
        close = nearest(name, SHIFTS)
        guess = f"; did you mean {close}?" if close else ""
        raise DataError(f"there is no shift {name!r}", hint=f"shifts: {', '.join(SHIFTS)}{guess}")
    shift = SHIFTS[name]
    try:
        value = float(raw) if raw else shift.default
    except ValueError:
        value = float("nan")
    if not shift.low <= value <= shift.high:
        raise DataError(
            f"{raw!r} is not a value for the shift {name!r}",
            hint=f"{name} takes {shift.low:g} … {shift.high:g} ({shift.meaning}); "
            f"{shift.default:g} where none is given",
        )
    return shift, value


def shifted(split: "Split", text: str) -> "Split":
    """The split with every image changed: `shifted(split, "rotate:20")`.

    Raises:
        DataError: no such shift, or a value out of bounds.
    """
    shift, value = parse_shift(text)
    name = text.partition(":")[0]

    def change(image: Image.Image, seed: int) -> Image.Image:
        return shift.change(image, value, seed)

    images = Changed(split.images, split.names, change, f"{name}:{value:g}")
    source = split.source if f"@{text}" in split.source else f"{split.source}@{text}"
    return replace(split, images=images, source=source)
