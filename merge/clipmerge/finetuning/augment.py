"""Random crops and what users add to them; each image is drawn from its own seed.

torchvision's transforms draw from torch's global generator. These draw from a generator made of (seed, epoch, item) and
hand what was drawn to torchvision's functions, so that an item looks the same whatever the number of workers, and a
resumed run sees what an uninterrupted one sees.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from clipmerge.data.pixels import image_size
from clipmerge.data.shifts import SHIFTS, parse_shift
from clipmerge.device import to_device
from clipmerge.errors import TrainingError
from clipmerge.types import Pixels

__all__ = ["Augmentation", "Crop", "DeviceCrops", "device_crops", "parse_augmentation"]

Step: TypeAlias = Callable[[Image, random.Random], Image]
Augmentation: TypeAlias = Callable[[Image, str], Pixels]
"""(image, seed) → uint8 pixels (3, H, W), before ToTensor and Normalize."""

DeviceCrops: TypeAlias = Callable[[Tensor, Sequence[str]], Tensor]
"""(squares, a seed for each) → fp32 pixels (n, 3, H, W) in 0 … 255."""

_HINT = (
    "one of none, crop, crop:0.5, flip, jitter:0.4, gray:0.2, noise:0.1, blur:1, contrast:0.5, randaugment:2,9, "
    "joined by +; or open_clip's aug-cfg"
)


def parse_augmentation(
    augment: str | Mapping[str, Any], preprocess: Mapping[str, Any]
) -> Augmentation | None:
    """Return what makes training pixels of an image and a seed; None where nothing is random.

    Args:
        augment: "none"; or steps joined by "+": "crop" (scale 0.9–1, as open_clip and FLYP), "crop:0.5"
            (scale 0.5–1), "flip", "jitter:0.4", "gray:0.2", "randaugment:N,M" (N operations, magnitude M of 30),
            "noise:0.1", "blur:1" and other corruptions of `data.shifts` (at half of the visits, by a strength drawn
            between nothing and that value, in pixels of the model's size); or open_clip's AugmentationCfg as a mapping.
        preprocess: open_clip's preprocess_cfg, for the size.

    Raises:
        TrainingError: no such augmentation.
    """
    if augment == "none":
        return None
    crop, steps = _parse(augment)
    height, width = image_size(preprocess)

    def apply(image: Image, seed: str) -> Pixels:
        generator = random.Random(seed)
        top, left, h, w = crop.draw(image.height, image.width, generator)
        image = tv.resized_crop(image, top, left, h, w, [height, width], InterpolationMode.BICUBIC)
        for step in steps:
            image = step(image, generator)
        return np.ascontiguousarray(np.asarray(image.convert("RGB")).transpose(2, 0, 1))

    return apply


def device_crops(augment: str | Mapping[str, Any], preprocess: Mapping[str, Any]) -> DeviceCrops:
    """Return what crops and flips batches on the device, from squares a little larger than the model's images.

    The boxes are those of the same augmentation on the CPU; the pixels are not: they come from a square that was
    decoded once, and are read by bilinear interpolation.

    Raises:
        TrainingError: the augmentation holds more than crops and flips.
    """
    crop, steps = _parse(augment)
    if any(step is not _flip for step in steps):
        raise TrainingError("only crops and flips can be made on the device", hint="leave out --augment-on")
    height, width = image_size(preprocess)

    def apply(pixels: Tensor, seeds: Sequence[str]) -> Tensor:
        size = pixels.shape[-1]
        boxes = []
        for seed in seeds:
            generator = random.Random(seed)
            top, left, h, w = crop.draw(size, size, generator)
            sign = -1 if steps and generator.random() < 0.5 else 1
            # From output coordinates in -1 … 1 to input coordinates: scaled, and moved to the box's centre.
            boxes.append([[sign * w, 0, 2 * left + w - size], [0, h, 2 * top + h - size]])
        matrices = to_device(np.array(boxes, dtype=np.float32) / size, pixels.device)
        grid = F.affine_grid(matrices, [len(seeds), 3, height, width], align_corners=False)
        return F.grid_sample(pixels.float(), grid, padding_mode="border", align_corners=False)

    return apply


@dataclass(frozen=True)
class Crop:
    """A random box: its share of the image's area, and its width over its height."""

    scale: tuple[float, float] = (0.9, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def draw(self, height: int, width: int, generator: random.Random) -> tuple[int, int, int, int]:
        """Return (top, left, height, width), distributed as torchvision's RandomResizedCrop."""
        low, high = self.ratio
        for _ in range(10):
            area = height * width * generator.uniform(*self.scale)
            aspect = math.exp(generator.uniform(math.log(low), math.log(high)))
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                return generator.randint(0, height - h), generator.randint(0, width - w), h, w
        w = min(width, round(height * high))
        h = min(height, round(width / low))
        return (height - h) // 2, (width - w) // 2, h, w


def _parse(augment: str | Mapping[str, Any]) -> tuple[Crop, list[Step]]:
    if isinstance(augment, Mapping):
        return _from_cfg(augment)
    crop = Crop()
    steps: list[Step] = []
    for part in augment.split("+"):
        name, _, value = part.strip().partition(":")
        try:
            numbers = [float(number) for number in value.split(",")] if value else []
        except ValueError as error:
            raise TrainingError(f"{part!r} is no augmentation", hint=_HINT) from error
        if name == "crop":
            crop = Crop((numbers[0], 1.0)) if numbers else Crop()
        elif name == "flip":
            steps.append(_flip)
        elif name == "jitter" and len(numbers) in (1, 4):
            steps.append(_jitter(numbers if len(numbers) == 4 else [*numbers * 3, numbers[0] / 4], 0.8))
        elif name == "gray" and numbers:
            steps.append(_gray(numbers[0]))
        elif name in CORRUPTIONS and len(numbers) <= 1:
            steps.append(_corruption(part.strip()))
        elif name == "randaugment" and len(numbers) == 2:
            steps.append(_randaugment(int(numbers[0]), int(numbers[1])))
        else:
            raise TrainingError(f"{part!r} is no augmentation", hint=_HINT)
    return crop, steps


def _from_cfg(cfg: Mapping[str, Any]) -> tuple[Crop, list[Step]]:
    known = {"scale", "ratio", "color_jitter", "color_jitter_prob", "gray_scale_prob"}
    if unknown := sorted(set(cfg) - known):
        hint = f"leave it out, or use randaugment:N,M; known: {', '.join(sorted(known))}"
        raise TrainingError(f"the aug-cfg has {', '.join(unknown)}, which is timm's", hint=hint)
    steps: list[Step] = []
    if cfg.get("color_jitter_prob"):
        steps.append(_jitter(list(cfg["color_jitter"]), float(cfg["color_jitter_prob"])))
    if cfg.get("gray_scale_prob"):
        steps.append(_gray(float(cfg["gray_scale_prob"])))
    return Crop(**{name: tuple(cfg[name]) for name in ("scale", "ratio") if name in cfg}), steps


def _flip(image: Image, generator: random.Random) -> Image:
    return tv.horizontal_flip(image) if generator.random() < 0.5 else image


def _gray(probability: float) -> Step:
    def step(image: Image, generator: random.Random) -> Image:
        return tv.to_grayscale(image, 3) if generator.random() < probability else image

    return step


def _jitter(strengths: list[float], probability: float) -> Step:
    """Return ColorJitter(brightness, contrast, saturation, hue) with a probability, as open_clip has it."""
    adjust = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]

    def step(image: Image, generator: random.Random) -> Image:
        if generator.random() >= probability:
            return image
        turns = list(zip(adjust, strengths, strict=True))
        generator.shuffle(turns)
        for change, strength in turns:
            low, high = (
                (-strength, strength) if change is tv.adjust_hue else (max(0.0, 1 - strength), 1 + strength)
            )
            image = change(image, generator.uniform(low, high))
        return image

    return step


CORRUPTIONS: Mapping[str, float] = {
    "noise": 0.0, "blur": 0.0, "rotate": 0.0, "contrast": 1.0, "brightness": 1.0, "pixelate": 1.0, "jpeg": 95.0,
}  # fmt: skip
"""Those of `data.shifts` that can be weaker → the value at which they change nothing (jpeg: next to nothing)."""


def _corruption(text: str) -> Step:
    """Return a corruption that half of the visits see, at most as strong as the text says: "noise:0.1"."""
    strongest = parse_shift(text)
    change, nothing = SHIFTS[strongest.name].change, CORRUPTIONS[strongest.name]

    def step(image: Image, generator: random.Random) -> Image:
        if generator.random() < 0.5:
            return image
        value = generator.uniform(nothing, strongest.value)
        if strongest.name == "rotate" and generator.random() < 0.5:
            value = -value
        return change(image, value, generator.getrandbits(64)).convert("RGB")

    return step


def _affine(image: Image, *, x: int = 0, y: int = 0, shear: tuple[float, float] | None = None) -> Image:
    angles = [math.degrees(math.atan(value)) for value in shear or (0.0, 0.0)]
    centre = (
        None if shear is None else [0.0, 0.0]
    )  # a shear starts at the corner, as RandAugment's authors have it
    sheared: Image = tv.affine(image, angle=0.0, translate=[x, y], scale=1.0, shear=angles, center=centre)
    return sheared


_RANDAUGMENT: list[tuple[Callable[[Image, float], Image], float, bool]] = [
    (lambda image, m: image, 0.0, False),
    (lambda image, m: _affine(image, shear=(m, 0.0)), 0.3, True),
    (lambda image, m: _affine(image, shear=(0.0, m)), 0.3, True),
    (lambda image, m: _affine(image, x=int(m * image.width)), 150 / 331, True),
    (lambda image, m: _affine(image, y=int(m * image.height)), 150 / 331, True),
    (lambda image, m: tv.rotate(image, m), 30.0, True),
    (lambda image, m: tv.adjust_brightness(image, 1 + m), 0.9, True),
    (lambda image, m: tv.adjust_saturation(image, 1 + m), 0.9, True),
    (lambda image, m: tv.adjust_contrast(image, 1 + m), 0.9, True),
    (lambda image, m: tv.adjust_sharpness(image, 1 + m), 0.9, True),
    (lambda image, m: tv.posterize(image, 8 - round(m)), 4.0, False),
    (lambda image, m: tv.solarize(image, 255 - m), 255.0, False),
    (lambda image, m: tv.autocontrast(image), 0.0, False),
    (lambda image, m: tv.equalize(image), 0.0, False),
]
"""RandAugment's operations in torchvision's order: what it does at magnitude m, the largest m, and whether its sign is
drawn. Source: Cubuk et al. 2019, arXiv 1909.13719."""


def _randaugment(operations: int, magnitude: int) -> Step:
    if not 0 <= magnitude <= 30:
        raise TrainingError(f"RandAugment's magnitude is {magnitude}", hint="a number from 0 to 30")

    def step(image: Image, generator: random.Random) -> Image:
        for _ in range(operations):
            change, largest, signed = generator.choice(_RANDAUGMENT)
            size = float(torch.linspace(0, largest, 31)[magnitude])
            image = change(image, -size if signed and generator.random() < 0.5 else size)
        return image

    return step
