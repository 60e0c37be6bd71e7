"""transformers' image processors ↔ open_clip's preprocess_cfg.

A processor's file has more switches than open_clip's configuration can say. What it says beyond that stands in the
preprocessing under two keys of our own: "steps" (how the image is resized and cropped: see `model.transforms`), and
"unread" (what the file asks for that nothing here does; scoring refuses it by name, merging does not need it).
"""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import isfinite
from typing import Any

MAX_EDGE = 1 << 14
"""Pixels: a model of larger images is a mistake in its file."""
OWN_KEYS = ("steps", "unread")
BY_STEPS = "steps"
"""The resize_mode of what open_clip's three modes cannot do."""

_OPENAI = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
_HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
_SQUARE = {"height": 224, "width": 224}
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "CLIP": {"size": {"shortest_edge": 224}, "crop_size": _SQUARE, "do_center_crop": True, "resample": 3, **_OPENAI},
    "Siglip": {"size": _SQUARE, "default_to_square": True, "resample": 3, **_HALF},
    "ViT": {"size": _SQUARE, "default_to_square": True, "resample": 2, **_HALF},
}  # fmt: skip
"""What each class takes where its file leaves a field out."""
_CLASS = re.compile(r"(\w+?)(?:ImageProcessor(?:Fast|Pil)?|FeatureExtractor)")
_RESAMPLE = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
"""PIL's numbers of filters."""
_UNREAD = (
    "do_pad",
    "do_thumbnail",
    "do_align_long_axis",
    "do_flip_channel_order",
    "do_grayscale",
    "use_square_size",
)


def from_processor(processor: Mapping[str, Any], model_type: str) -> dict[str, Any]:
    """Make a preprocess_cfg of an image processor's file; {} where there is none.

    Args:
        model_type: of the model's config.json: whose processor it is where the file does not say.
    """
    if not processor:
        return {}
    word = processor.get("image_processor_type") or processor.get("feature_extractor_type") or ""
    named = _CLASS.fullmatch(str(word))
    family = named[1] if named else "Siglip" if model_type.startswith("siglip") else "CLIP"
    says = {
        **_DEFAULTS.get(family, {}),
        **{key: value for key, value in processor.items() if value is not None},
    }
    if wrong := _malformed(says):
        return {"unread": f"{wrong} = {str(says[wrong])[:80]!r}"}
    asked = [key for key in _UNREAD if says.get(key)]
    if asked or (family not in _DEFAULTS and named):
        return {"unread": f"{word or family} with {', '.join(asked)}" if asked else str(word)}
    resize = (
        _edges(says.get("size"), square=bool(says.get("default_to_square")))
        if says.get("do_resize", True)
        else None
    )
    crop = _edges(says.get("crop_size"), square=True) if says.get("do_center_crop") else None
    size = crop if isinstance(crop, list) else resize
    if not isinstance(size, list) or isinstance(resize, str):
        return {"unread": f"images of different sizes (size {says.get('size')}, do_center_crop {bool(crop)})"}
    filter_name = _RESAMPLE.get(says.get("resample", 3))
    if filter_name is None:
        return {"unread": f"resample {says.get('resample')}"}
    cfg = {"size": size[0] if size[0] == size[1] else size, "interpolation": filter_name, **_scale(says)}
    if crop is None and filter_name in ("bilinear", "bicubic"):
        return {**cfg, "resize_mode": "squash"}
    plain = crop == [resize, resize] and filter_name in ("bilinear", "bicubic")
    # Even then there is a step of its own: where a margin is odd, torchvision crops half a pixel to the other side.
    return {
        **cfg,
        "resize_mode": "shortest" if plain else BY_STEPS,
        "steps": {"resize": resize, "crop": crop},
    }


def to_processor(preprocess: Mapping[str, Any]) -> dict[str, Any] | None:
    """Make CLIPImageProcessor's file of a preprocess_cfg; None where it cannot do what is asked."""
    codes = {name: code for code, name in _RESAMPLE.items()}
    size, resample = preprocess.get("size"), codes.get(preprocess.get("interpolation", "bicubic"))
    edges = list(size) if isinstance(size, list | tuple) else [size, size]
    mode = preprocess.get("resize_mode", "shortest")
    is_complete = (
        all(isinstance(edge, int) for edge in edges) and preprocess.get("mean") and preprocess.get("std")
    )
    square = len(set(edges)) == 1
    if resample is None or not is_complete or "unread" in preprocess or (mode == "shortest" and not square):
        return None
    steps = preprocess.get("steps")
    if mode == "squash":
        steps = {"resize": edges, "crop": None}
    elif mode == "shortest":
        steps = {"resize": edges[0], "crop": edges}
    elif mode != BY_STEPS or not isinstance(steps, Mapping):
        return None
    resize, crop = steps["resize"], steps["crop"]
    return {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": _named(crop or edges),
        "do_center_crop": crop is not None,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": resize is not None,
        "image_mean": list(preprocess["mean"]),
        "image_std": list(preprocess["std"]),
        "rescale_factor": 1 / 255,
        "resample": resample,
        "size": {"shortest_edge": resize} if isinstance(resize, int) else _named(resize or edges),
    }


def for_open_clip(preprocess: Mapping[str, Any]) -> dict[str, Any]:
    """Return what open_clip's own configuration can say of a preprocessing, the nearest where it cannot say it."""
    cfg = {key: value for key, value in preprocess.items() if key not in OWN_KEYS}
    if cfg.get("resize_mode") == BY_STEPS:
        cfg["resize_mode"] = "shortest"
    if cfg.get("interpolation") not in (None, "bilinear", "bicubic", "random"):
        cfg["interpolation"] = "bicubic"
    return cfg


def _malformed(says: Mapping[str, Any]) -> str | None:
    """Return the first field whose value cannot mean what the field is for; None where all can."""

    def is_number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)

    def is_edge(value: Any) -> bool:
        return value is None or (is_number(value) and 0 < value <= MAX_EDGE)

    def edges(value: Any) -> Iterable[Any]:
        return value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else [value]

    def channels(value: Any) -> Sequence[Any]:
        return value if isinstance(value, list) and len(value) == 3 else [value]

    checks: dict[str, Callable[[Any], bool]] = {
        "size": lambda value: all(map(is_edge, edges(value))),
        "crop_size": lambda value: all(map(is_edge, edges(value))),
        "resample": is_number,
        "rescale_factor": lambda value: is_number(value) and value > 0,
        "image_mean": lambda value: all(map(is_number, channels(value))),
        "image_std": lambda value: all(is_number(each) and each > 0 for each in channels(value)),
    }
    return next((key for key, check in checks.items() if key in says and not check(says[key])), None)


def _scale(says: Mapping[str, Any]) -> dict[str, Any]:
    """Mean and std of pixels in 0 … 1 that do what rescaling and normalising do, each where it is asked for."""
    factor = says.get("rescale_factor", 1 / 255) if says.get("do_rescale", True) else 1
    stretch = 255 * factor  # what a white pixel is before it is normalised
    if not says.get("do_normalize", True):
        return {"mean": [0.0] * 3, "std": [1 / stretch] * 3}
    both = [says.get("image_mean"), says.get("image_std")]
    mean, std = ([value] * 3 if isinstance(value, int | float) else value for value in both)
    if abs(stretch - 1) > 1e-9:
        mean, std = ([value / stretch for value in values] if values else values for values in (mean, std))
    return {key: list(value) for key, value in (("mean", mean), ("std", std)) if value}


def _edges(size: Any, *, square: bool) -> "int | list[int] | str | None":
    """The shorter edge, [height, width], or a text where a size is more than either."""
    if isinstance(size, int | float):
        return [int(size)] * 2 if square else int(size)
    if isinstance(size, list | tuple) and len(size) == 2:
        return [int(edge) for edge in size]
    if isinstance(size, Mapping):
        said = {key: value for key, value in size.items() if value is not None}
        if said.keys() == {"height", "width"}:
            return [int(said["height"]), int(said["width"])]
        if said.keys() == {"shortest_edge"}:
            return [int(said["shortest_edge"])] * 2 if square else int(said["shortest_edge"])
    return str(size)


def _named(edges: Any) -> dict[str, Any]:
    return {"height": edges[0], "width": edges[1]}
