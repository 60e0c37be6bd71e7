"""Guess which of open_clip's models a checkpoint is for, for a hint where nobody names the model."""

from collections.abc import Mapping
from typing import Any

__all__ = ["guess_model"]

Shapes = Mapping[str, tuple[int, ...]]


def guess_model(shapes: Shapes) -> list[str]:
    """Return the names of open_clip's models that have these tensors; its towers from timm or transformers left out."""
    import open_clip

    return [name for name in open_clip.list_models() if _fits(open_clip.get_model_config(name), shapes)]


def _fits(config: Mapping[str, Any], shapes: Shapes) -> bool:
    """Compare the sizes and numbers of layers that tell models apart."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    decoder = "multimodal_cfg" in config
    if "timm_model_name" in vision or "hf_model_name" in text:
        return False
    prefix = "text." if "text.positional_embedding" in shapes else ""
    layers, image, width = vision.get("layers", 12), vision.get("image_size", 224), vision.get("width", 768)
    patch, pool = vision.get("patch_size", 16), ""
    stages = {"visual.transformer.resblocks": layers}
    first: tuple[int, ...] = (width, 3, patch, patch)
    if isinstance(layers, list):
        patch, pool, first, width = 32, "attnpool.", (width // 2, 3, 3, 3), 32 * width
        stages = {f"visual.layer{i}": count for i, count in enumerate(layers, 1)}
    stages[f"{prefix}transformer.resblocks"] = text.get("layers", 12)
    text_width, context = text.get("width", 512), text.get("context_length", 77)
    sizes = {
        "visual.conv1.weight": first,
        f"visual.{pool}positional_embedding": ((image // patch) ** 2 + 1, width),
        f"{prefix}positional_embedding": (context + bool(text.get("embed_cls")), text_width),
        f"{prefix}token_embedding.weight": (text.get("vocab_size", 49408), text_width),
    }
    return (
        all(shapes.get(name) == size for name, size in sizes.items())
        and all(_count(shapes, f"{stage}.") == count for stage, count in stages.items())
        and any(name.startswith("text_decoder.") for name in shapes) == decoder
    )


def _count(shapes: Shapes, stage: str) -> int:
    return len({name[len(stage) :].split(".")[0] for name in shapes if name.startswith(stage)})
