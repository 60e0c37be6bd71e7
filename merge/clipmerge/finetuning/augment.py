"""Random crops and what users add to them; each image is drawn from its own seed.

torchvision's transforms draw from torch's global generator. These draw from a generator made of (seed, epoch, item) and
hand what was drawn to torchvision's functions, so that an item looks the same whatever the number of workers, and a
resumed run sees what an uninterrupted one sees.
"""

import math
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from PIL.Image import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from clipmerge.errors import TrainingError
from clipmerge.types import Pixels

__all__ = ["Augmentation", "Crop", "parse_augmentation"]

Step: TypeAlias = Callable[[Image, random.Random], Image]
Augmentation: TypeAlias = Callable[[Image, str], Pixels]
"""(image, seed) → uint8 pixels (3, H, W), before ToTensor and Normalize."""

_HINT = "one of none, crop, crop:0.5, flip, jitter:0.4, gray:0.2, randaugment:2,9, joined by +; or open_clip's aug-cfg"


def parse_augmentation(
    augment: str | Mapping[str, Any], preprocess: Mapping[str, Any]
) -> Augmentation | None:
    """Return what makes training pixels of an image and a seed; None where nothing is random.

    Args:
        augment: "none"; or steps joined by "+": "crop" (scale 0.9–1, as open_clip and FLYP), "crop:0.5"
            (scale 0.5–1), "flip", "jitter:0.4", "gray:0.2", "randaugment:N,M" (N operations, magnitude M of 30);
            or open_clip's AugmentationCfg as a mapping, `use_timm` included.
        preprocess: open_clip's preprocess_cfg, for the size.

    Raises:
        TrainingError: no such augmentation.
    """
    size = preprocess["size"]
    height, width = (size, size) if isinstance(size, int) else size
    if augment == "none":
        return None
    if isinstance(augment, Mapping) and augment.get("use_timm"):
        return _timm(augment, (height, width), str(preprocess["interpolation"]))
    crop, steps = _from_cfg(augment) if isinstance(augment, Mapping) else _from_text(augment)

    def apply(image: Image, seed: str) -> Pixels:
        generator = random.Random(seed)
        top, left, h, w = crop.draw(image.height, image.width, generator)
        image = tv.resized_crop(image, top, left, h, w, [height, width], InterpolationMode.BICUBIC)
        for step in steps:
            image = step(image, generator)
        return np.ascontiguousarray(np.asarray(image.convert("RGB")).transpose(2, 0, 1))

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


def _from_text(text: str) -> tuple[Crop, list[Step]]:
    crop = Crop()
    steps: list[Step] = []
    for part in text.split("+"):
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
        elif name == "randaugment" and len(numbers) == 2:
            steps.append(_randaugment(int(numbers[0]), int(numbers[1])))
        else:
            raise TrainingError(f"{part!r} is no augmentation", hint=_HINT)
    return crop, steps


def _from_cfg(cfg: Mapping[str, Any]) -> tuple[Crop, list[Step]]:
    known = {"scale", "ratio", "color_jitter", "color_jitter_prob", "gray_scale_prob", "use_timm"}
    if unknown := sorted(set(cfg) - known):
        raise TrainingError(
            f"the aug-cfg has {', '.join(unknown)}, which only timm's transform knows",
            hint="add use_timm=true",
        )
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


def _timm(cfg: Mapping[str, Any], size: tuple[int, int], interpolation: str) -> Augmentation:
    """Return timm's training transform, whose three global generators are seeded for each image and put back."""
    from timm.data.transforms_factory import create_transform

    options = {k: v for k, v in cfg.items() if k not in ("use_timm", "color_jitter_prob", "gray_scale_prob")}
    if options.get("re_prob"):
        raise TrainingError(
            "random erasing works on normalised images", hint="leave re_prob out of the aug-cfg"
        )
    options = {"color_jitter": None, "hflip": 0.0, **options}
    transform = create_transform(
        (3, *size), is_training=True, mean=(0, 0, 0), std=(1, 1, 1), interpolation=interpolation, **options
    )

    def apply(image: Image, seed: str) -> Pixels:
        number = random.Random(seed).getrandbits(32)
        before = random.getstate(), np.random.get_state()
        with torch.random.fork_rng(devices=[]):
            random.seed(number)
            np.random.seed(number)
            torch.default_generator.manual_seed(number)  # torch.manual_seed would reseed every GPU as well
            pixels: Pixels = (transform(image) * 255).round().to(torch.uint8).numpy()
        random.setstate(before[0])
        np.random.set_state(before[1])
        return pixels

    return apply
