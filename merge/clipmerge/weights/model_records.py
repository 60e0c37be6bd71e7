"""What checkpoints say about their model, put together: configurations by meaning, preprocessing key by key.

"Not said" never competes with "said": a checkpoint that leaves out its mean takes part in a soup of others that name
theirs. Two statements that differ are refused, and whoever merges says which holds.
"""

from collections.abc import Mapping, Sequence
from math import isclose
from typing import Any

from clipmerge.errors import MismatchError

_VISION = {"layers": 12, "width": 768, "head_width": 64, "mlp_ratio": 4.0, "patch_size": 16, "image_size": 224,
           "patch_dropout": 0.0, "attn_pooler_queries": 256, "attn_pooler_heads": 8, "pos_embed_type": "learnable",
           "pool_type": "tok", "timm_pool": "avg", "timm_proj": "linear", "timm_drop": 0.0}  # fmt: skip
_TEXT = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 12, "mlp_ratio": 4.0,
         "eos_id": 2, "pool_type": "argmax", "proj_type": "linear", "hf_proj_type": "mlp",
         "hf_pooler_type": "mean_pooler"}  # fmt: skip
"""open_clip's defaults of CLIPVisionCfg and CLIPTextCfg, but those that are None, False or 0."""
_BUILDS_THE_SAME = frozenset({
    "init_logit_scale", "output_dict", "cast_dtype", "timm_model_pretrained", "hf_model_pretrained", "patch_dropout",
    "timm_drop", "timm_drop_path", "tokenizer_kwargs", "tokenizer_mode", "hf_tokenizer_name", "output_tokens",
})  # fmt: skip
"""Keys that change neither the names of tensors nor what a trained model computes of an image and token ids."""

NamedRecord = tuple[str, Mapping[str, Any]]
"""Which checkpoint, and its record {"name", "config", "preprocess"}: each part may be missing."""


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """List where two of open_clip's model_cfg mean different models: `vision_cfg.width: 768 and 1024`.

    Defaults are filled in, numbers compared as numbers, and a tower that one of them leaves out is not compared.
    """
    whole = [key for key in ("vision_cfg", "text_cfg") if key in a and key in b]
    left, right = (_flat(config, whole) for config in (a, b))
    if len(whole) < 2:  # of one tower, the rest of the model is not said
        said = {key for key in {*a, *b} if key in a and key in b} | {"quick_gelu"} & {*a, *b}
        left, right = (
            {k: v for k, v in flat.items() if k.partition(".")[0] in said} for flat in (left, right)
        )
    return [
        f"{key}: {_shown(left.get(key))} and {_shown(right.get(key))}"
        for key in sorted(left.keys() | right.keys())
        if not _equal(left.get(key), right.get(key))
    ]


def combined(records: Sequence[NamedRecord]) -> dict[str, Any] | None:
    """Put together what checkpoints say of their model; None where none says anything.

    Args:
        records: the first that says something wins where two say the same in other words.

    Raises:
        MismatchError: two of them say different things; names both, and what differs.
    """
    whole: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for where, record in records:
        config, preprocess = record.get("config"), record.get("preprocess")
        if isinstance(config, Mapping):
            if "config" in whole and (differing := differences(whole["config"], config)):
                raise MismatchError(
                    f"{sources['config']} was made for {whole.get('name')}, {where} for {record.get('name')}: "
                    f"they differ in {'; '.join(differing[:3])}",
                    hint="different models cannot be merged, even where the shapes agree; say which holds with --model",
                )
            more = {key: value for key, value in config.items() if key not in whole.get("config", {})}
            if (
                "config" not in whole or "text_cfg" in more or "vision_cfg" in more
            ):  # one tower alone has no name
                whole["config"] = {**whole.get("config", {}), **more}
                whole["name"], sources["config"] = record.get("name"), where
        elif record.get("name") is not None:
            whole.setdefault("name", record["name"])
        if isinstance(preprocess, Mapping):
            mine = whole.setdefault("preprocess", {})
            for key, value in preprocess.items():
                if key in mine and not _equal(*(_plain(key, v) for v in (mine[key], value))):
                    raise MismatchError(
                        f"{sources[key]} says {key} = {_shown(mine[key])} of its images, {where} {_shown(value)}",
                        hint="say which holds: --model CONFIG.json with a preprocess_cfg that has it",
                    )
                if key not in mine:
                    mine[key], sources[key] = value, where
    return whole or None


def _flat(config: Mapping[str, Any], towers: Sequence[str]) -> dict[str, Any]:
    """The settings that make a model, defaults filled in; those that say nothing (None, False, 0) left out."""
    flat = {key: value for key, value in config.items() if not isinstance(value, Mapping)}
    for tower in towers:
        own = {key: value for key, value in config[tower].items() if value is not None}
        part = {**(_VISION if tower == "vision_cfg" else _TEXT), **own}
        if part.get("timm_model_name") or part.get("hf_model_name"):  # these bring their own sizes
            part = {k: v for k, v in part.items() if k in own and k not in ("layers", "width", "patch_size")}
        elif isinstance(part["width"], int | float) and isinstance(part["mlp_ratio"], int | float):
            part["mlp_ratio"] = int(
                part["width"] * part["mlp_ratio"]
            )  # what it makes; 8/3 has no exact spelling
        flat |= {f"{tower}.{key}": value for key, value in part.items() if key not in _BUILDS_THE_SAME}
    for key, value in config.items():
        if isinstance(value, Mapping) and key not in ("vision_cfg", "text_cfg"):
            flat |= {f"{key}.{inner}": setting for inner, setting in value.items()}
    plain = {key: _plain(key.rpartition(".")[2], value) for key, value in flat.items()}
    return {key: value for key, value in plain.items() if value and key not in _BUILDS_THE_SAME}


def _plain(key: str, value: Any) -> Any:
    """One spelling: lists, not tuples; one number for a square size, three for one mean of all channels."""
    if isinstance(value, list | tuple):
        value = list(value)
        return (
            value[0]
            if key in ("size", "image_size", "patch_size") and len(set(map(str, value))) == 1
            else value
        )
    return [value] * 3 if key in ("mean", "std") and isinstance(value, int | float) else value


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, list) and isinstance(b, list):
        return len(a) == len(b) and all(map(_equal, a, b))
    if isinstance(a, int | float) and isinstance(b, int | float):
        return isclose(a, b, rel_tol=1e-6)
    return bool(a == b)


def _shown(value: Any) -> str:
    return "not set" if value is None else str(list(value) if isinstance(value, tuple) else value)[:80]
