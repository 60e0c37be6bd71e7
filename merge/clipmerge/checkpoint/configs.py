"""The model's configuration beside its weights: open_clip's and Hugging Face's, and the way between them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipmerge.checkpoint.safetensors import read_json

MAX_CONFIG = 1 << 20
_ACTIVATIONS = {"quick_gelu": True, "gelu": False}
_INTERPOLATIONS = {2: "bilinear", 3: "bicubic"}
_TEXT = {
    "context_length": ("max_position_embeddings", 77),
    "vocab_size": ("vocab_size", 49408),
    "width": ("hidden_size", 512),
    "heads": ("num_attention_heads", 8),
    "layers": ("num_hidden_layers", 12),
}
"""open_clip's word → CLIPConfig's, and the default of both."""
_VISION = {
    "image_size": ("image_size", 224),
    "layers": ("num_hidden_layers", 12),
    "width": ("hidden_size", 768),
    "patch_size": ("patch_size", 32),
}


def model_beside(path: Path) -> dict[str, Any] | None:
    """Read the model record {"name", "config", "preprocess"} of the folder that `path` lies in, where it has one.

    Raises:
        CheckpointError: there is a configuration, but it is not JSON, or absurdly large.
    """
    ours = _read(path.with_name("open_clip_config.json"))
    if isinstance(ours.get("model_cfg"), dict):
        return _record(path, ours["model_cfg"], ours.get("preprocess_cfg"))
    config = from_huggingface_config(_read(path.with_name("config.json")))
    if config is None:
        return None
    return _record(path, config, _preprocess(_read(path.with_name("preprocessor_config.json"))))


def from_huggingface_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Make open_clip's model_cfg of a CLIPModel's config.json; None where open_clip has no such model.

    Values that the file leaves out are CLIPConfig's own defaults.
    """
    text, vision = config.get("text_config"), config.get("vision_config")
    if not isinstance(text, dict) or not isinstance(vision, dict):
        return None
    exact = all(part.get("layer_norm_eps", 1e-5) == 1e-5 for part in (text, vision))
    if config.get("model_type") != "clip" or not exact:
        return None
    try:
        quick = {_ACTIVATIONS[part.get("hidden_act", "quick_gelu")] for part in (text, vision)}
        image = {word: vision.get(theirs, default) for word, (theirs, default) in _VISION.items()}
        words = {word: text.get(theirs, default) for word, (theirs, default) in _TEXT.items()}
        image["head_width"] = image["width"] // vision.get("num_attention_heads", 12)
        image["mlp_ratio"] = vision.get("intermediate_size", 3072) / image["width"]
        words["mlp_ratio"] = text.get("intermediate_size", 2048) / words["width"]
    except (KeyError, TypeError, ZeroDivisionError):
        return None
    sizes = {"embed_dim": config.get("projection_dim", 512), "vision_cfg": image, "text_cfg": words}
    return {**sizes, "quick_gelu": quick.pop()} if len(quick) == 1 else None


def to_huggingface_config(model: Mapping[str, Any]) -> dict[str, Any] | None:
    """Make CLIPModel's config.json for open_clip's model_cfg; None where transformers has no such model."""
    vision, text = {"patch_size": 16, **model.get("vision_cfg", {})}, model.get("text_cfg", {})
    known = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}
    unknown_vision = vision.keys() - _VISION.keys() - {"mlp_ratio", "head_width"}
    if model.keys() - known or unknown_vision or text.keys() - _TEXT.keys() - {"mlp_ratio"}:
        return None
    if not isinstance(vision.get("layers", 12), int):  # a ResNet has a list of them
        return None

    def tower(part: Mapping[str, Any], words: Mapping[str, tuple[str, int]]) -> dict[str, Any]:
        sizes = {theirs: part.get(word, default) for word, (theirs, default) in words.items()}
        wide = int(sizes["hidden_size"] * part.get("mlp_ratio", 4.0))
        act = "quick_gelu" if model.get("quick_gelu") else "gelu"
        return {**sizes, "intermediate_size": wide, "hidden_act": act, "projection_dim": model["embed_dim"]}

    image = tower(vision, _VISION)
    image["num_attention_heads"] = image["hidden_size"] // vision.get("head_width", 64)
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": model["embed_dim"],
        "text_config": {"model_type": "clip_text_model", **tower(text, _TEXT)},
        "vision_config": {"model_type": "clip_vision_model", **image},
    }


def to_huggingface_preprocessor(preprocess: Mapping[str, Any]) -> dict[str, Any] | None:
    """Make CLIPImageProcessor's preprocessor_config.json; None where it cannot do what this preprocess_cfg asks."""
    codes = {name: code for code, name in _INTERPOLATIONS.items()}
    size, resample = preprocess.get("size"), codes.get(preprocess.get("interpolation", "bicubic"))
    edge = size[0] if isinstance(size, list | tuple) and len(set(size)) == 1 else size
    is_shortest = preprocess.get("resize_mode", "shortest") == "shortest"
    is_complete = (
        isinstance(edge, int) and resample is not None and preprocess.get("mean") and preprocess.get("std")
    )
    if not is_shortest or not is_complete:
        return None
    return {
        "image_processor_type": "CLIPImageProcessor",
        "crop_size": {"height": edge, "width": edge},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_resize": True,
        "image_mean": list(preprocess["mean"]),
        "image_std": list(preprocess["std"]),
        "resample": resample,
        "size": {"shortest_edge": edge},
    }


def to_text(config: Mapping[str, Any]) -> bytes:
    """Return a configuration file's bytes: the same for the same configuration."""
    return json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def _record(path: Path, config: Mapping[str, Any], preprocess: Any) -> dict[str, Any]:
    preprocess = preprocess if isinstance(preprocess, dict) else {}
    return {"name": path.resolve().parent.name, "config": dict(config), "preprocess": preprocess}


def _preprocess(config: Mapping[str, Any]) -> dict[str, Any]:
    """open_clip's preprocess_cfg for an image processor's; {} where the file is not there."""
    size = config.get("crop_size")
    fields = {
        "size": size.get("height") if isinstance(size, dict) else size,
        "mean": config.get("image_mean"),
        "std": config.get("image_std"),
        "interpolation": _INTERPOLATIONS.get(config.get("resample", 3)),
    }
    return {key: value for key, value in fields.items() if value is not None} if config else {}


def _read(path: Path) -> dict[str, Any]:
    document = read_json(path, MAX_CONFIG) if path.is_file() else {}
    return document if isinstance(document, dict) else {}
