"""PEFT's LoRA adapters: the factors of a file, as updates of the weights that they adapt.

A weight's update is scale · B·A with scale = lora_alpha / r (by its root with rsLoRA). What changes the sum in another
way (DoRA, biases, whole modules, an initialisation that changed the base …) is refused by name.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path
from typing import Any

from clipmerge.checkpoint.layouts import to_open_clip
from clipmerge.checkpoint.safetensors import read_json
from clipmerge.checkpoint.sets import choose_set
from clipmerge.checkpoint.tensors import Checkpoint, LowRank, Tensor, identifiers
from clipmerge.checkpoint.views import transpose
from clipmerge.errors import CheckpointError
from clipmerge.text import and_more

CONFIG = "adapter_config.json"
MAX_CONFIG, MAX_PATTERN, MAX_NAME, MAX_NUMEL = 1 << 20, 300, 500, 1 << 31
_FACTOR = re.compile(
    r"(?:base_model\.model\.)?(?P<module>.+)\.(?:lora_(?P<linear>[AB])(?:\.default)?\.weight"
    r"|lora_embedding_(?P<embedding>[AB])(?:\.default)?)"
)
_LORA = re.compile(r"\.lora_(?:[AB]|embedding_[AB])(?:\.|$)")
_QKV = re.compile(r"(.+\.self_attn\.)[qkv](_proj\.weight)")
_WILD = re.compile(r"\)[*+{?]|(?:[*+}].*){4}")
"""Regular expressions that can take for ever: repeated groups, and more than three repetitions."""
_PLAIN = (True, False, "gaussian", "eva", "orthogonal")
"""Initialisations that left the base's weights alone."""
_HARMLESS = frozenset({
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "fan_in_fan_out", "use_rslora",
    "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "megatron_core", "qalora_group_size",
    "eva_config", "runtime_config", "ensure_weight_tying",
})  # fmt: skip
"""Keys of LoraConfig that a merge follows, or that mean nothing once training is over."""
_NAMES = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "lora_bias": "biases",
}
_HINT = "merge it into its base with peft (merge_and_unload), and give the whole model"
_ALONE = {"VisionTransformer": "visual.", "ModifiedResNet": "visual.", "TimmModel": "visual."}
"""open_clip's image towers by themselves: class → what stands before their names in the whole model."""


@dataclass(frozen=True, slots=True)
class Factors:
    """What an adapter adds to some rows of a tensor: scale · B·A, or its transpose.

    Attributes:
        rows: of the tensor (q, k and v of one `in_proj_weight` have factors of their own).
    """

    rows: slice
    product: LowRank


def is_adapter(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether these are the factors of a LoRA adapter."""
    return any(_LORA.search(name) for name in tensors)


def factors_of(tensor: Tensor) -> tuple[Factors, ...]:
    """List the factors of an adapter's tensor; those of rank 0 (q, k or v that is not adapted) are left out."""
    found, top = [], 0
    for extent in tensor.extents:
        if not isinstance(extent.source, LowRank):
            return ()
        rows = extent.source.b.shape[0]
        if extent.source.b.shape[1]:
            found.append(Factors(slice(top, top + rows), extent.source))
        top += rows
    return tuple(found)


def read_adapter(file: Path, place: Path, stem: str, tensors: Mapping[str, Tensor]) -> Checkpoint:
    """Make the checkpoint of an adapter: a task vector that is zero in every tensor that it lacks.

    Args:
        tensors: what the file holds, under its own names.

    Raises:
        CheckpointError: no configuration lies beside the file, it asks for more than a plain LoRA, or the factors do
            not fit it.
    """
    path = file.with_name(CONFIG)
    if not path.is_file():
        hint = "its scale (lora_alpha / r) stands there: give the folder that peft wrote"
        raise CheckpointError(
            f"{file} holds the factors of an adapter, but {CONFIG} does not lie beside it", hint=hint
        )
    config = read_json(path, MAX_CONFIG)
    config = config if isinstance(config, dict) else {}
    _check_config(path, config)
    updates, scales = {}, {}
    for module, a, b, is_embedding in _pairs(file, tensors):
        scales[module] = _scale(path, config, module, rank=a.shape[0])
        name, update = _update(
            file, module, a, b, scales[module], is_embedding, bool(config.get("fan_in_fan_out"))
        )
        updates[_prefix(path, config, name) + name] = update
    chosen = choose_set(str(file), {"": _with_whole_attention(updates)}, None)
    named = to_open_clip(chosen, siglip=_adapted_class(config).startswith("Siglip"))
    stem = place.resolve().parent.name if stem == "adapter_model" else stem
    base = config.get("base_model_name_or_path")
    return Checkpoint(
        identifiers([stem])[0],
        named.tensors,
        layout="peft",
        path=place,
        extra={
            "vector": True,
            "base": base if isinstance(base, str) and base else None,
            "lora": {
                "scales": scales,
                "fan_in_fan_out": bool(config.get("fan_in_fan_out")),
                "adapts": sorted(named.tensors),
            },
        },
        factors=Checkpoint("factors", tensors, path=path),
    )


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{path} is of the kind {str(kind)[:40]!r}: only LORA is read", hint=_HINT)
    start = config.get("init_lora_weights", True)
    uses = [
        f"{_NAMES.get(key, key)} ({key})" if key in _NAMES else f"{key} = {str(value)[:80]!r}"
        for key, value in sorted(config.items())
        if value and key not in _HARMLESS and key not in ("bias", "init_lora_weights", "loftq_config")
    ]
    uses += [f"bias = {config['bias']!r}"] if config.get("bias", "none") != "none" else []
    uses += (
        [f"init_lora_weights = {str(start)[:40]!r}, which changed the base"] if start not in _PLAIN else []
    )
    if uses:
        raise CheckpointError(f"{path} asks for more than a plain LoRA: {and_more(uses)}", hint=_HINT)


def _pairs(file: Path, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, Tensor, bool]]:
    """Yield (module, A, B, whether it is an embedding's) of each adapted module.

    Raises:
        CheckpointError: the file holds something else too, or one factor without the other.
    """
    pairs: dict[tuple[str, bool], dict[str, Tensor]] = {}
    others = []
    for name, tensor in sorted(tensors.items()):
        match = _FACTOR.fullmatch(name) if len(name) <= MAX_NAME else None
        if match is None:
            others.append(repr(name[:120]))
        else:
            key = match["module"], match["embedding"] is not None
            pairs.setdefault(key, {})[match["linear"] or match["embedding"]] = tensor
    if others:
        raise CheckpointError(f"{file} holds more than a LoRA's two factors: {and_more(others)}", hint=_HINT)
    for (module, is_embedding), pair in pairs.items():
        if pair.keys() != {"A", "B"}:
            raise CheckpointError(f"{file} holds one factor of {module!r} without the other", hint=_HINT)
        a, b = pair["A"], pair["B"]
        if (
            not (a.is_float and b.is_float)
            or len(a.shape) < 2
            or len(b.shape) < 2
            or a.shape[0] != b.shape[1]
        ):
            shapes = f"A is {a.dtype} {list(a.shape)}, B is {b.dtype} {list(b.shape)}"
            raise CheckpointError(f"{file}: the factors of {module!r} do not fit: {shapes}", hint=_HINT)
        yield module, a, b, is_embedding


def _scale(path: Path, config: Mapping[str, Any], module: str, rank: int) -> float:
    """Compute what multiplies B·A, by the module's name in the model as peft saw it.

    Raises:
        CheckpointError: rank or alpha are no numbers, or the factors have another rank.
    """
    key = module.partition(".base_layer")[0]  # attention's out_proj goes with its attention
    r = _by_pattern(path, config, "rank_pattern", key, config.get("r"))
    alpha = _by_pattern(path, config, "alpha_pattern", key, config.get("lora_alpha"))
    if (
        isinstance(r, bool)
        or not isinstance(r, int)
        or isinstance(alpha, bool)
        or not isinstance(alpha, int | float)
    ):
        raise CheckpointError(f"{path}: r and lora_alpha are not numbers: {r!r}, {alpha!r}", hint=_HINT)
    if r != rank or not rank:
        raise CheckpointError(f"{path} gives {module!r} the rank {r}, its factors have {rank}", hint=_HINT)
    # In torch's MultiheadAttention, peft (at least to 0.21.2, see huggingface/peft#3774) adds the update twice: in
    # every step of training, which merges first, and when it merges. So the model that was trained has it twice.
    twice = 2 if module.endswith(".base_layer.out_proj") else 1
    return twice * alpha / (sqrt(r) if config.get("use_rslora") else r)


def _by_pattern(path: Path, config: Mapping[str, Any], table: str, key: str, default: Any) -> Any:
    """Look a module up in rank_pattern or alpha_pattern: the first regular expression that ends its name decides."""
    patterns = config.get(table) or {}
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if len(pattern) > MAX_PATTERN or _WILD.search(pattern):
            raise CheckpointError(
                f"{path}: {table} has a pattern that is not read: {pattern[:80]!r}", hint=_HINT
            )
        try:
            if re.fullmatch(rf"(?:.*\.)?(?:{pattern})", key):
                return value
        except re.error as error:
            message = f"{path}: {table} has a pattern that is no regular expression: {pattern[:80]!r}"
            raise CheckpointError(message, hint=_HINT) from error
    return default


def _update(
    file: Path, module: str, a: Tensor, b: Tensor, scale: float, is_embedding: bool, fan_in_fan_out: bool
) -> tuple[str, Tensor]:
    """Return the weight's name and its update, in the weight's own shape."""
    weight = module.replace(".base_layer", "")
    name = f"{weight}.{'in_proj_weight' if weight.rpartition('.')[2] == 'attn' else 'weight'}"
    shape = (b.shape[0], *a.shape[1:])
    if prod(shape) > MAX_NUMEL or prod(b.shape) != b.shape[0] * b.shape[1]:
        raise CheckpointError(f"{file}: the factors of {module!r} do not fit: {list(b.shape)}", hint=_HINT)
    if len(a.shape) > 2:  # a convolution: A is one, B is 1 × 1
        a, b = _flat(a), _flat(b)
    if is_embedding or (fan_in_fan_out and len(shape) == 2):
        a, b, shape = transpose(b), transpose(a), (shape[1], shape[0])
    return name, LowRank(b, a, scale).tensor(shape)


def _flat(tensor: Tensor) -> Tensor:
    return Tensor(tensor.dtype, (tensor.shape[0], prod(tensor.shape[1:])), tensor.extents)


def _adapted_class(config: Mapping[str, Any]) -> str:
    """The name of the class that peft adapted, "" where it did not write it."""
    mapping = config.get("auto_mapping")
    return str(mapping.get("base_model_class")) if isinstance(mapping, dict) else ""


def _prefix(path: Path, config: Mapping[str, Any], name: str) -> str:
    """What stands before a name in the whole model, where a tower was adapted by itself."""
    adapted = _adapted_class(config)
    if name.startswith(("encoder.", "embeddings.", *(["head."] if adapted.startswith("Siglip") else []))):
        if ("Vision" in adapted) == ("Text" in adapted):
            message = (
                f"{path} does not say whether it adapts the image tower or the text tower: {name[:80]!r}"
            )
            raise CheckpointError(
                message, hint="auto_mapping.base_model_class names the class that was adapted"
            )
        return "vision_model." if "Vision" in adapted else "text_model."
    return "" if name.startswith("visual.") else _ALONE.get(adapted, "")


def _with_whole_attention(updates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Put zeros, as factors of rank 0, where only some of q, k and v are adapted: open_clip keeps them together."""
    whole = dict(updates)
    for name, tensor in updates.items():
        if match := _QKV.fullmatch(name):
            rows, columns = tensor.shape
            zero = LowRank(Tensor("F32", (rows, 0), ()), Tensor("F32", (0, columns), ()), 0.0)
            for letter in "qkv":
                whole.setdefault(f"{match[1]}{letter}{match[2]}", zero.tensor(tensor.shape))
    return whole
