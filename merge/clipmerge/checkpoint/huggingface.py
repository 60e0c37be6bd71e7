"""Names of Hugging Face's CLIPModel ↔ open_clip's.

Two things differ besides names: q, k and v are apart (open_clip keeps them as one `in_proj`), and the two projections
are transposed. Both are views: nothing is read.
"""

import re
from collections.abc import Mapping

from clipmerge.checkpoint.tensors import Tensor
from clipmerge.checkpoint.views import concatenate, split, transpose
from clipmerge.errors import MismatchError
from clipmerge.text import and_more

_PLAIN = {
    "logit_scale": "logit_scale",
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
}
_TRANSPOSED = {"text_projection.weight": "text_projection", "visual_projection.weight": "visual.proj"}
_TOWERS = {"text_model": "transformer", "vision_model": "visual.transformer"}
_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_LAYER = re.compile(r"(text_model|vision_model)\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_RESBLOCK = re.compile(
    r"(visual\.transformer|transformer)\.resblocks\.(\d+)\.(attn\.in_proj|.+)[._](weight|bias)"
)
_QKV = re.compile(r"self_attn\.([qkv])_proj")
_BACK = {ours: theirs for table in (_PLAIN, _TRANSPOSED, _TOWERS, _BLOCK) for theirs, ours in table.items()}


def from_huggingface(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors under open_clip's names, and the names that have no place in open_clip's CLIP, sorted.

    Raises:
        MismatchError: one of q, k, v is missing or different, where every name has a place.
    """
    ours: dict[str, Tensor] = {}
    fused: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for name, tensor in tensors.items():
        layer = _LAYER.fullmatch(name)
        if name in _PLAIN:
            ours[_PLAIN[name]] = tensor
        elif name in _TRANSPOSED and len(tensor.shape) == 2:
            ours[_TRANSPOSED[name]] = transpose(tensor)
        elif layer and (qkv := _QKV.fullmatch(layer[3])):
            target = f"{_TOWERS[layer[1]]}.resblocks.{layer[2]}.attn.in_proj_{layer[4]}"
            fused.setdefault(target, {})[qkv[1]] = tensor
        elif layer and layer[3] in _BLOCK:
            ours[f"{_TOWERS[layer[1]]}.resblocks.{layer[2]}.{_BLOCK[layer[3]]}.{layer[4]}"] = tensor
        else:
            unknown.append(name)
    if unknown:
        return ours, sorted(unknown)
    _refuse([name for name, parts in fused.items() if not _fit(parts)], "cannot be made of their q, k and v")
    ours |= {name: concatenate([parts[letter] for letter in "qkv"]) for name, parts in fused.items()}
    return ours, []


def to_huggingface(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under the names of Hugging Face's CLIPModel.

    Raises:
        MismatchError: a tensor has no place there (a trained head, another architecture).
    """
    theirs: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in tensors.items():
        match = _RESBLOCK.fullmatch(name)
        layer = f"{_BACK[match[1]]}.encoder.layers.{match[2]}" if match else ""
        if name in _PLAIN.values():
            theirs[_BACK[name]] = tensor
        elif name in _TRANSPOSED.values() and len(tensor.shape) == 2:
            theirs[_BACK[name]] = transpose(tensor)
        elif match and match[3] == "attn.in_proj" and tensor.shape and tensor.shape[0] % 3 == 0:
            for letter, piece in zip("qkv", split(tensor, 3), strict=True):
                theirs[f"{layer}.self_attn.{letter}_proj.{match[4]}"] = piece
        elif match and match[3] in _BLOCK.values():
            theirs[f"{layer}.{_BACK[match[3]]}.{match[4]}"] = tensor
        else:
            unknown.append(name)
    _refuse(unknown, "have no place in Hugging Face's CLIPModel")
    return theirs


def _fit(parts: Mapping[str, Tensor]) -> bool:
    kinds = {(tensor.dtype, tensor.shape) for tensor in parts.values()}
    return set(parts) == set("qkv") and len(kinds) == 1 and bool(next(iter(kinds))[1])


def _refuse(names: list[str], why: str) -> None:
    if names:
        raise MismatchError(
            f"{len(names)} tensors {why}: {and_more([repr(name[:120]) for name in sorted(names)])}",
            hint="this layout is read for CLIP with two transformer towers; convert other models with their own tools",
        )
