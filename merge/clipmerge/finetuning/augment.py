"""Training images: open_clip's random crop and what its users add, each image from its own seed.

torchvision's transforms draw from one global generator, which threads share. These draw from a generator made of
(seed, epoch, item), so that the same item looks the same whatever the number of workers, and a resumed run sees what
the uninterrupted one saw.
"""

import math
import random
from collections.abc import Callable, Mapping
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from clipmerge.errors import TrainingError

__all__ = ["augmenter"]

Pixels = npt.NDArray[np.uint8]
Change = Callable[[Image.Image, random.Random], Image.Image]
Augmenter = Callable[[Image.Image, str], Pixels]

_HINT = "one of none, crop, crop:0.5, flip, jitter:0.4, gray:0.2, randaugment:2,9, joined by +; or open_clip's aug-cfg"


def augmenter(augment: str | Mapping[str, Any], preprocess: Mapping[str, Any]) -> Augmenter | None:
    """(image, seed) → uint8 pixels (3, H, W) before normalisation; None where nothing is random.

    Args:
        augment: "none"; or steps joined by "+": "crop" (scale 0.9–1, as open_clip and FLYP), "crop:0.5"
            (scale 0.5–1), "flip", "jitter:0.4", "gray:0.2", "randaugment:N,M" (N operations, magnitude M of 30);
            or open_clip's AugmentationCfg as a mapping, `use_timm` included.
        preprocess: open_clip's preprocess_cfg, for the size.
    """
    height, width = _size(preprocess["size"])
    if isinstance(augment, Mapping) and augment.get("use_timm"):
        return _timm(augment, (height, width), str(preprocess["interpolation"]))
    changes = _from_cfg(augment) if isinstance(augment, Mapping) else _from_text(augment)
    if changes is None:
        return None
    crop, rest = changes

    def apply(image: Image.Image, seed: str) -> Pixels:
        generator = random.Random(seed)
        image = _resized_crop(image, generator, (height, width), *crop)
        for change in rest:
            image = change(image, generator)
        return np.ascontiguousarray(np.asarray(image.convert("RGB")).transpose(2, 0, 1))

    return apply


def _size(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


Crop = tuple[tuple[float, float], tuple[float, float]]
_CROP: Crop = ((0.9, 1.0), (3 / 4, 4 / 3))


def _from_text(text: str) -> tuple[Crop, list[Change]] | None:
    crop = _CROP
    changes: list[Change] = []
    if text == "none":
        return None
    for step in text.split("+"):
        name, _, value = step.strip().partition(":")
        numbers = _numbers(step, value)
        if name == "crop":
            crop = ((numbers[0] if numbers else 0.9, 1.0), _CROP[1])
        elif name == "flip":
            changes.append(_flip)
        elif name == "jitter" and numbers:
            changes.append(
                _jitter([*(numbers * 3)[:3], numbers[0] / 4] if len(numbers) == 1 else numbers, 0.8)
            )
        elif name == "gray" and numbers:
            changes.append(_gray(numbers[0]))
        elif name == "randaugment" and len(numbers) == 2:
            changes.append(_randaugment(int(numbers[0]), int(numbers[1])))
        else:
            raise TrainingError(f"{step!r} is no augmentation", hint=_HINT)
    return crop, changes


def _numbers(step: str, value: str) -> list[float]:
    try:
        return [float(number) for number in value.split(",")] if value else []
    except ValueError as error:
        raise TrainingError(f"{step!r} is no augmentation", hint=_HINT) from error


def _from_cfg(cfg: Mapping[str, Any]) -> tuple[Crop, list[Change]]:
    known = {"scale", "ratio", "color_jitter", "color_jitter_prob", "gray_scale_prob", "use_timm"}
    if unknown := sorted(set(cfg) - known):
        raise TrainingError(
            f"the aug-cfg has {', '.join(unknown)}, which only timm's transform knows",
            hint="add use_timm=true",
        )
    changes: list[Change] = []
    if cfg.get("color_jitter_prob"):
        changes.append(_jitter(list(cfg["color_jitter"]), float(cfg["color_jitter_prob"])))
    if cfg.get("gray_scale_prob"):
        changes.append(_gray(float(cfg["gray_scale_prob"])))
    return (tuple(cfg.get("scale", _CROP[0])), tuple(cfg.get("ratio", _CROP[1]))), changes


def _resized_crop(
    image: Image.Image,
    generator: random.Random,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Image.Image:
    """torchvision's RandomResizedCrop, drawn from `generator`; bicubic, as open_clip trains."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms import functional as tf

    top, left, height, width = _crop_box(image.height, image.width, generator, scale, ratio)
    found: Image.Image = tf.resized_crop(
        image, top, left, height, width, list(size), InterpolationMode.BICUBIC
    )
    return found


def _crop_box(
    height: int,
    width: int,
    generator: random.Random,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    for _ in range(10):
        area = height * width * generator.uniform(*scale)
        aspect = math.exp(generator.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return generator.randint(0, height - h), generator.randint(0, width - w), h, w
    w, h = width, height
    if width / height < ratio[0]:
        h = round(width / ratio[0])
    elif width / height > ratio[1]:
        w = round(height * ratio[1])
    return (height - h) // 2, (width - w) // 2, h, w


def _flip(image: Image.Image, generator: random.Random) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if generator.random() < 0.5 else image


def _gray(probability: float) -> Change:
    def change(image: Image.Image, generator: random.Random) -> Image.Image:
        return image.convert("L").convert("RGB") if generator.random() < probability else image

    return change


def _jitter(strengths: list[float], probability: float) -> Change:
    """torchvision's ColorJitter(brightness, contrast, saturation, hue) with a probability, as open_clip has it."""

    def change(image: Image.Image, generator: random.Random) -> Image.Image:
        from torchvision.transforms import functional as tf

        if generator.random() >= probability:
            return image
        names = ["brightness", "contrast", "saturation", "hue"]
        turns = list(zip(names, strengths, strict=True))
        generator.shuffle(turns)
        for name, strength in turns:
            centre = 0.0 if name == "hue" else 1.0
            low = centre - strength if name == "hue" else max(0.0, centre - strength)
            factor = generator.uniform(low, centre + strength)
            image = getattr(tf, f"adjust_{name}")(image, factor)
        return image

    return change


def _randaugment(operations: int, magnitude: int) -> Change:
    """torchvision's RandAugment with its own operations, drawn from the item's generator."""
    from torchvision.transforms import InterpolationMode, RandAugment
    from torchvision.transforms.autoaugment import _apply_op

    if not 0 <= magnitude <= 30:
        raise TrainingError(f"RandAugment's magnitude is {magnitude}", hint="a number from 0 to 30")
    table = RandAugment(operations, magnitude)

    def change(image: Image.Image, generator: random.Random) -> Image.Image:
        space = table._augmentation_space(31, (image.height, image.width))
        for _ in range(operations):
            name = generator.choice(list(space))
            steps, signed = space[name]
            size = float(steps[magnitude]) if steps.ndim else 0.0
            size = -size if signed and generator.random() < 0.5 else size
            image = _apply_op(image, name, size, interpolation=InterpolationMode.NEAREST, fill=None)
        return image

    return change


_timm_lock = Lock()


def _timm(cfg: Mapping[str, Any], size: tuple[int, int], interpolation: str) -> Augmenter:
    """timm's training transform. It draws from global generators, so one image is made at a time."""
    import torch
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

    def apply(image: Image.Image, seed: str) -> Pixels:
        number = random.Random(seed).getrandbits(32)
        with _timm_lock, torch.random.fork_rng(devices=[]):
            kept = random.getstate(), np.random.get_state()
            random.seed(number)
            np.random.seed(number)
            torch.manual_seed(number)
            pixels = transform(image)
            random.setstate(kept[0])
            np.random.set_state(kept[1])
        found: Pixels = (pixels * 255).round().to(torch.uint8).numpy()
        return found

    return apply
