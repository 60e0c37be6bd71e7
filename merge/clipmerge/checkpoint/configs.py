"""The model's configuration beside its weights: open_clip's and Hugging Face's, and the way between them."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipmerge.checkpoint.processors import from_processor
from clipmerge.checkpoint.safetensors import read_json
from clipmerge.checkpoint.siglip import from_siglip_config, preprocessing_of, to_siglip_config

MAX_CONFIG = 1 << 20
_TANH = {"approximate": "tanh"}
_ACTIVATIONS: Mapping[str, tuple[bool, Mapping[str, str]]] = {
    "quick_gelu": (True, {}),
    "gelu": (False, {}),
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_new", "gelu_fast"), (False, _TANH)),  # one formula
}
"""transformers' activation → open_clip's quick_gelu, which both towers share, and its act_kwargs, a tower's own."""
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
    """Read what the folder that `path` lies in says of its model: {"name", "config", "preprocess"}, each where known.

    Where a CLIP's or SigLIP's configuration makes no model of open_clip's, "untranslated" says why.

    Where `path` is a link and nothing lies beside it, the folder that it leads to is asked.

    Raises:
        CheckpointError: there is a configuration, but it is not JSON, or absurdly large.
    """
    for place in dict.fromkeys((path, path.resolve())):
        if (record := _record(place)) is not None:
            return record
    return None


def _record(path: Path) -> dict[str, Any] | None:
    ours = _read(path.with_name("open_clip_config.json"))
    if isinstance(ours.get("model_cfg"), dict):
        preprocess = ours.get("preprocess_cfg")
        known = {
            "config": ours["model_cfg"],
            "preprocess": preprocess if isinstance(preprocess, dict) else {},
        }
        return {"name": repository(path), **known}
    theirs = _read(path.with_name("config.json"))
    config, tower = from_huggingface_config(theirs, path.parent), from_tower_config(theirs)
    # As transformers itself: a processor nested in the newer file wins over the older file.
    nested = _read(path.with_name("processor_config.json")).get("image_processor")
    processor = nested if isinstance(nested, dict) else _read(path.with_name("preprocessor_config.json"))
    if not processor and theirs.get("model_type") == "siglip" and config:
        processor = preprocessing_of(theirs)
    preprocess = from_processor(processor, str(theirs.get("model_type", "")))
    if config is None:
        why = None if tower else why_untranslated(theirs)
        known = {"config": tower, "preprocess": preprocess, "untranslated": why}
        return {key: value for key, value in known.items() if value} or None
    return {"name": repository(path), "config": config, "preprocess": preprocess}


def repository(path: Path) -> str:
    """Return what a checkpoint's folder is called: in the Hub's cache the repository, not the snapshot's number."""
    folder = Path(os.path.abspath(path)).parent  # noqa: PTH100 (links are not followed: they lead to a cache's blobs)
    for outer in folder.parents:
        if outer.name == "snapshots" and outer.parent.name.startswith("models--"):
            return outer.parent.name.rpartition("--")[2]
    return folder.name


def from_huggingface_config(config: Mapping[str, Any], folder: Path | None = None) -> dict[str, Any] | None:
    """Make open_clip's model_cfg of a CLIPModel's or SiglipModel's config.json; None where open_clip has none.

    Values that the file leaves out are CLIPConfig's own defaults. `text_config_dict` and `vision_config_dict` of old
    files win over `text_config` and `vision_config`, with all of their defaults, as in transformers.

    Args:
        folder: where SigLIP's tokenizer is looked for.
    """
    if config.get("model_type") == "siglip":
        return from_siglip_config(config, folder)
    text, vision = _tower(config, "text"), _tower(config, "vision")
    if text is None or vision is None:
        return None
    exact = all(part.get("layer_norm_eps", 1e-5) == 1e-5 for part in (text, vision))
    if config.get("model_type") != "clip" or not exact:
        return None
    try:
        activations = [_ACTIVATIONS[part.get("hidden_act", "quick_gelu")] for part in (vision, text)]
        image = {word: vision.get(theirs, default) for word, (theirs, default) in _VISION.items()}
        words = {word: text.get(theirs, default) for word, (theirs, default) in _TEXT.items()}
        image["head_width"] = image["width"] // vision.get("num_attention_heads", 12)
        image["mlp_ratio"] = vision.get("intermediate_size", 3072) / image["width"]
        words["mlp_ratio"] = text.get("intermediate_size", 2048) / words["width"]
    except (KeyError, TypeError, ZeroDivisionError):
        return None
    for part, (_, kwargs) in zip((image, words), activations, strict=True):
        part |= {"act_kwargs": dict(kwargs)} if kwargs else {}
    sizes = {"embed_dim": config.get("projection_dim", 512), "vision_cfg": image, "text_cfg": words}
    (quick, _), (other, _) = activations
    return {**sizes, "quick_gelu": quick} if quick == other else None


def from_tower_config(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Make the part of open_clip's model_cfg that a CLIPVisionModel's or CLIPTextModel's config.json says.

    None where it is the configuration of something else, or says what open_clip's model cannot do.
    """
    towers = {"clip_vision_model": "vision", "clip_text_model": "text"}
    tower = towers.get(str(config.get("model_type")))
    if tower is None:
        return None
    own = dict(config)
    other = {"hidden_act": own.get("hidden_act", "quick_gelu")}  # a model's towers have one activation
    parts = {f"{tower}_config": own, f"{({'vision', 'text'} - {tower}).pop()}_config": other}
    whole = from_huggingface_config({"model_type": "clip", **parts})
    return whole and {"quick_gelu": whole["quick_gelu"], f"{tower}_cfg": whole[f"{tower}_cfg"]}


def why_untranslated(config: Mapping[str, Any]) -> str | None:
    """Say why a CLIP's or SigLIP's config.json makes no model of open_clip's; None where it is of another kind."""
    defaults = {"clip": ("quick_gelu", 1e-5), "siglip": ("gelu_pytorch_tanh", 1e-6)}
    usual, epsilon = defaults.get(str(config.get("model_type")), ("", 0.0))
    if not usual:
        return None
    towers = [_tower(config, word) or {} for word in ("vision", "text")]
    acts = [str(part.get("hidden_act", usual)) for part in towers]
    if unknown := [act for act in acts if act not in _ACTIVATIONS]:
        return f"its config.json has hidden_act {unknown[0][:40]!r}, which open_clip has not"
    if len({_ACTIVATIONS[act][0] for act in acts}) > 1:
        return (
            f"its config.json has {acts[0]} in the image tower and {acts[1]} in the text tower, "
            "but open_clip has QuickGELU in both or in none"
        )
    other = [eps for part in towers if (eps := part.get("layer_norm_eps", epsilon)) != epsilon]
    return f"its config.json has {f'layer_norm_eps {other[0]}' if other else 'sizes'} that open_clip has not"


def _tower(config: Mapping[str, Any], tower: str) -> dict[str, Any] | None:
    own, old = config.get(f"{tower}_config"), config.get(f"{tower}_config_dict")
    return old if isinstance(old, dict) else own if isinstance(own, dict) else None


def to_huggingface_config(model: Mapping[str, Any]) -> dict[str, Any] | None:
    """Make CLIPModel's or SiglipModel's config.json for open_clip's model_cfg; None where transformers has none."""
    if (siglip := to_siglip_config(model)) is not None:
        return siglip
    vision, text = {"patch_size": 16, **model.get("vision_cfg", {})}, model.get("text_cfg", {})
    known = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu"}
    unknown_vision = vision.keys() - _VISION.keys() - {"mlp_ratio", "head_width", "act_kwargs"}
    if model.keys() - known or unknown_vision or text.keys() - _TEXT.keys() - {"mlp_ratio", "act_kwargs"}:
        return None
    if any((part.get("act_kwargs") or _TANH) != _TANH for part in (vision, text)):
        return None
    if not isinstance(vision.get("layers", 12), int):  # a ResNet has a list of them
        return None

    def tower(part: Mapping[str, Any], words: Mapping[str, tuple[str, int]]) -> dict[str, Any]:
        sizes = {theirs: part.get(word, default) for word, (theirs, default) in words.items()}
        wide = int(sizes["hidden_size"] * part.get("mlp_ratio", 4.0))
        exact = "quick_gelu" if model.get("quick_gelu") else "gelu"
        act = "gelu_pytorch_tanh" if part.get("act_kwargs") else exact
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


def to_text(config: Mapping[str, Any]) -> bytes:
    """Return a configuration file's bytes: the same for the same configuration."""
    return json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False).encode() + b"\n"


def _read(path: Path) -> dict[str, Any]:
    document = read_json(path, MAX_CONFIG) if path.is_file() else {}
    return document if isinstance(document, dict) else {}
