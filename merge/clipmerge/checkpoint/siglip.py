"""SigLIP's configuration: transformers' config.json ↔ open_clip's model_cfg with timm's image tower.

open_clip names the image tower after one that timm publishes, and can say neither other sizes nor another activation.
What a folder has beyond that stands under a key of our own, `vision_cfg.timm_args`: arguments for timm's function of
that name (see `model.build`).
"""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clipmerge.errors import ClipmergeWarning, MismatchError

TIMM_ARGS = "timm_args"
_SIZES = {
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "so400m": (1152, 27, 16, 4304),
    "giantopt": (1536, 40, 16, 6144),
}
"""timm's word → width, layers, heads, width of the MLP."""
_EXACT = {
    "base_patch16": (224, 256, 384, 512),
    "large_patch16": (256, 384),
    "so400m_patch14": (224, 378, 384),
}
_TANH = {
    "base_patch32": (256,),
    "large_patch16": (512,),
    "so400m_patch16": (256, 384, 512),
    "giantopt_patch16": (256, 384),
}
"""The image sizes of `vit_WORD_siglip_SIZE` in timm, by how these compute GELU: exactly, or by tanh."""
_ACTIVATIONS = {"gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
"""transformers' word → timm's."""
_TOKENIZERS = {
    32000: "timm/ViT-B-16-SigLIP",
    250000: "timm/ViT-B-16-SigLIP-i18n-256",
    256000: "timm/ViT-B-16-SigLIP2",
}
"""The tokenizers of the published models, by the size of their vocabulary."""
_TEXT = {
    "width": ("hidden_size", 512),
    "heads": ("num_attention_heads", 8),
    "layers": ("num_hidden_layers", 12),
    "vocab_size": ("vocab_size", 49408),
    "context_length": ("max_position_embeddings", 77),
}
"""open_clip's word → SiglipTextConfig's, and open_clip's default."""
_SIZE_WORDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
_BASE = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072,
         "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}  # fmt: skip
_TEXT_DEFAULTS = {**_BASE, "vocab_size": 32000, "max_position_embeddings": 64}
_VISION_DEFAULTS = {**_BASE, "image_size": 224, "patch_size": 16, "num_channels": 3, "vision_use_head": True}


def from_siglip_config(config: Mapping[str, Any], folder: Path | None = None) -> dict[str, Any] | None:
    """Make open_clip's model_cfg of a SiglipModel's config.json; None where open_clip has no such model.

    Args:
        folder: where the tokenizer is looked for, before the published one of that vocabulary.
    """
    own = [config.get(key) or {} for key in ("text_config", "vision_config")]
    if config.get("model_type") != "siglip" or not all(isinstance(tower, Mapping) for tower in own):
        return None
    text, vision = {**_TEXT_DEFAULTS, **own[0]}, {**_VISION_DEFAULTS, **own[1]}
    projection = text.get("projection_size") or text["hidden_size"]
    fixed = {"num_channels": 3, "vision_use_head": True, "layer_norm_eps": 1e-6}
    sizes = {*_SIZE_WORDS, "image_size", "patch_size"}
    numbers = [text[key] for key in (*(theirs for theirs, _ in _TEXT.values()), "intermediate_size")] + [
        vision[key] for key in sizes
    ]
    if (
        any(vision[key] != value for key, value in fixed.items())
        or not all(isinstance(number, int) and number > 0 for number in (projection, *numbers))
        or not all(tower["hidden_act"] in [*_ACTIVATIONS] for tower in (text, vision))
        or projection != vision["hidden_size"]  # open_clip's image tower has no projection
    ):
        return None
    words: dict[str, Any] = {word: text[theirs] for word, (theirs, _) in _TEXT.items()}
    words |= {"no_causal_mask": True, "proj_bias": True, "pool_type": "last"}
    words |= {"mlp_ratio": _ratio(text), "norm_kwargs": {"eps": text["layer_norm_eps"]}}
    if text["hidden_act"] != "gelu":
        words["act_kwargs"] = {"approximate": "tanh"}
    has_own = folder is not None and any(
        (folder / name).is_file() for name in ("tokenizer.json", "spiece.model")
    )
    published = None if has_own else _TOKENIZERS.get(text["vocab_size"])
    if published or folder is not None:
        words["hf_tokenizer_name"] = published or str(folder)
    words["tokenizer_kwargs"] = {"clean": "canonicalize"}
    return {
        "embed_dim": projection,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {"image_size": vision["image_size"], **_timm_tower(vision)},
        "text_cfg": words,
    }


def to_siglip_config(model: Mapping[str, Any]) -> dict[str, Any] | None:
    """Make SiglipModel's config.json for open_clip's model_cfg; None where transformers has no such model."""
    vision, text = model.get("vision_cfg", {}), model.get("text_cfg", {})
    tower = _tower_of(str(vision.get("timm_model_name")))
    fixed = {"pool_type": "last", "no_causal_mask": True, "proj_bias": True}
    pooled = vision.get("timm_pool") == "map" and vision.get("timm_proj") == "none"
    if tower is None or not pooled or any(text.get(key) != value for key, value in fixed.items()):
        return None
    args = vision.get(TIMM_ARGS, {})
    names = {"img_size": "image_size", "patch_size": "patch_size", "embed_dim": "hidden_size",
             "depth": "num_hidden_layers", "num_heads": "num_attention_heads"}  # fmt: skip
    tower |= {theirs: args[word] for word, theirs in names.items() if word in args}
    if "mlp_ratio" in args:
        tower["intermediate_size"] = int(tower["hidden_size"] * args["mlp_ratio"])
    if "act_layer" in args:
        tower["hidden_act"] = next(theirs for theirs, act in _ACTIVATIONS.items() if act == args["act_layer"])
    sizes = {theirs: text.get(word, default) for word, (theirs, default) in _TEXT.items()}
    wide = int(sizes["hidden_size"] * text.get("mlp_ratio", 4.0))
    tanh = (text.get("act_kwargs") or {}).get("approximate") == "tanh"
    eps = {"layer_norm_eps": (text.get("norm_kwargs") or {}).get("eps", 1e-5)}
    words = {
        **sizes,
        **eps,
        "intermediate_size": wide,
        "hidden_act": "gelu_pytorch_tanh" if tanh else "gelu",
        "projection_size": model["embed_dim"],
    }
    return {
        "architectures": ["SiglipModel"],
        "model_type": "siglip",
        "text_config": {"model_type": "siglip_text_model", **words},
        "vision_config": {"model_type": "siglip_vision_model", **tower},
    }


def preprocessing_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the processor's file that a SiglipModel's folder without one stands for: the class's own values."""
    size = (config.get("vision_config") or {}).get("image_size", 224)
    return {"image_processor_type": "SiglipImageProcessor", "size": {"height": size, "width": size}}


def for_open_clip_alone(config: Mapping[str, Any], *, quiet: bool = False) -> dict[str, Any]:
    """Return the model_cfg that open_clip itself can read, on any machine.

    Args:
        quiet: leave the warning to a later call.

    Raises:
        MismatchError: open_clip has no name for a tower of these sizes.

    Warns:
        ClipmergeWarning: open_clip's model of that name computes GELU otherwise.
    """
    text = dict(config.get("text_cfg", {}))
    if Path(str(text.get("hf_tokenizer_name"))).is_absolute() and text.get("vocab_size") in _TOKENIZERS:
        text["hf_tokenizer_name"] = _TOKENIZERS[text["vocab_size"]]
        config = {**config, "text_cfg": text}
    vision = dict(config.get("vision_cfg", {}))
    args = vision.pop(TIMM_ARGS, None)
    if not args:
        return dict(config)
    if args.keys() != {"act_layer"}:
        raise MismatchError(
            "open_clip has no name for an image tower of these sizes, so that no folder of its own can hold it",
            hint="write the weights alone (-o NAME.safetensors), or convert --to huggingface",
        )
    if not quiet:
        warnings.warn(
            f"open_clip's {vision['timm_model_name']} computes GELU in another form than these weights were trained "
            "with: open_clip's scores of this folder differ a little from transformers' and from clipmerge's",
            ClipmergeWarning,
            stacklevel=2,
        )
    return {**config, "vision_cfg": vision}


def _timm_tower(vision: Mapping[str, Any]) -> dict[str, Any]:
    """The tower's name in timm, and arguments where timm publishes none that is the same."""
    name, act = _published(vision), _ACTIVATIONS[vision["hidden_act"]]
    args: dict[str, Any] = {}
    if name is None:
        name = "vit_base_patch16_siglip_224"
        args = {"img_size": vision["image_size"], "patch_size": vision["patch_size"], "mlp_ratio": _ratio(vision),
                "embed_dim": vision["hidden_size"], "depth": vision["num_hidden_layers"],
                "num_heads": vision["num_attention_heads"]}  # fmt: skip
    if (tower := _tower_of(name)) and _ACTIVATIONS[tower["hidden_act"]] != act:
        args["act_layer"] = act
    known = {
        "timm_model_name": name,
        "timm_model_pretrained": False,
        "timm_pool": "map",
        "timm_proj": "none",
    }
    return {**known, TIMM_ARGS: args} if args else known


def _published(vision: Mapping[str, Any]) -> str | None:
    for word, sizes in _SIZES.items():
        name = f"vit_{word}_patch{vision['patch_size']}_siglip_{vision['image_size']}"
        if sizes == tuple(vision[key] for key in _SIZE_WORDS) and _tower_of(name):
            return name
    return None


def _tower_of(name: str) -> dict[str, Any] | None:
    """SiglipVisionConfig's values of timm's published tower."""
    for act, table in (("gelu", _EXACT), ("gelu_pytorch_tanh", _TANH)):
        for kind, images in table.items():
            for size in images:
                if name == f"vit_{kind}_siglip_{size}":
                    word, _, patch = kind.partition("_patch")
                    width, layers, heads, wide = _SIZES[word]
                    return {"image_size": size, "patch_size": int(patch), "hidden_size": width,
                            "num_hidden_layers": layers, "num_attention_heads": heads,
                            "intermediate_size": wide, "hidden_act": act}  # fmt: skip
    return None


def _ratio(tower: Mapping[str, Any]) -> float:
    """The MLP's width relative to the tower's, so that int(width · ratio) gives it back."""
    width, wide = int(tower["hidden_size"]), int(tower["intermediate_size"])
    return wide / width if int(width * (wide / width)) == wide else (wide + 0.5) / width
