"""Which of open_clip's models have the shapes of a checkpoint: a hint where nobody names the model."""

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clipmerge.weights.weights import Weights

__all__ = ["alike"]

Shapes = Mapping[str, tuple[int, ...]]


def alike(weights: "Weights") -> list[str]:
    """Names of open_clip's models whose sizes are those of the weights; models of timm and Hugging Face are not
    told apart by sizes, and left out."""
    import open_clip

    found = _sizes({name: tensor.shape for name, tensor in weights.checkpoints[0].tensors.items()})
    if found is None:
        return []
    return [name for name in open_clip.list_models() if _said(open_clip.get_model_config(name)) == found]


def _sizes(shapes: Shapes) -> dict[str, Any] | None:
    """What the shapes say, in the words of `_said`."""
    resnet = "visual.layer1.0.conv1.weight" in shapes
    image = "visual.attnpool.positional_embedding" if resnet else "visual.positional_embedding"
    prefix = "text." if "text.positional_embedding" in shapes else ""
    text, words = f"{prefix}positional_embedding", f"{prefix}token_embedding.weight"
    if not {image, text, words, "visual.conv1.weight"} <= shapes.keys():
        return None
    patch = 32 if resnet else shapes["visual.conv1.weight"][-1]
    depth: Any = _count(shapes, r"visual\.transformer\.resblocks\.(\d+)\.")
    if resnet:
        depth = [_count(shapes, rf"visual\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)]
    return {
        "image": round((shapes[image][0] - 1) ** 0.5) * patch,
        "patch": patch,
        "width": shapes["visual.layer1.0.conv1.weight" if resnet else "visual.conv1.weight"][0],
        "layers": depth,
        "context": shapes[text][0] - int(f"{prefix}cls_emb" in shapes),
        "decoder": any(name.startswith("text_decoder.") for name in shapes),
        "vocabulary": shapes[words][0],
        "text width": shapes[words][1],
        "text layers": _count(
            shapes, rf"{prefix}transformer\.resblocks\.(\d+)\.".replace("text.", r"text\.")
        ),
    }


def _said(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The same sizes in an open_clip configuration, with open_clip's defaults."""
    vision, text = config["vision_cfg"], config["text_cfg"]
    if "timm_model_name" in vision or "hf_model_name" in text:
        return None
    layers = vision.get("layers", 12)
    return {
        "image": vision.get("image_size", 224),
        "patch": 32 if isinstance(layers, list) else vision.get("patch_size", 16),
        "width": vision.get("width", 768),
        "layers": layers,
        "context": text.get("context_length", 77),
        "decoder": "multimodal_cfg" in config,
        "vocabulary": text.get("vocab_size", 49408),
        "text width": text.get("width", 512),
        "text layers": text.get("layers", 12),
    }


def _count(names: Iterable[str], pattern: str) -> int:
    """How many different numbers the pattern finds at the start of names."""
    found = (re.match(pattern, name) for name in names)
    return len({match.group(1) for match in found if match})
