"""Names of Hugging Face's CLIPModel ↔ open_clip's.

Three things differ besides names: q, k and v are apart (open_clip keeps them as one `in_proj`), the two
projections are transposed, and old files carry integer `position_ids`. All three are views: nothing is read.
"""

import re
from collections.abc import Mapping

from clipmerge.checkpoint.tensors import Tensor
from clipmerge.checkpoint.views import cut, joined, transposed
from clipmerge.errors import MismatchError

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
    r"(visual\.transformer|transformer)\.resblocks\.(\d+)\.(attn\.in_proj_|.+\.)(weight|bias)"
)
_HEADS = re.compile(r"self_attn\.([qkv])_proj")

_BACK = {new: old for old, new in _PLAIN.items()}
_BACK_TRANSPOSED = {new: old for old, new in _TRANSPOSED.items()}
_BACK_TOWERS = {new: old for old, new in _TOWERS.items()}
_BACK_BLOCK = {new: old for old, new in _BLOCK.items()}


def from_huggingface(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors under open_clip's names, and the names that were dropped (`position_ids`).

    Raises:
        MismatchError: a name has no place in open_clip's CLIP, or one of q, k, v is missing or different.
    """
    found: dict[str, Tensor] = {}
    fused: dict[str, dict[str, Tensor]] = {}
    dropped, unknown = [], []
    for name, tensor in tensors.items():
        if name.endswith(".position_ids"):
            dropped.append(name)
        elif name in _PLAIN:
            found[_PLAIN[name]] = tensor
        elif name in _TRANSPOSED and len(tensor.shape) == 2:
            found[_TRANSPOSED[name]] = transposed(tensor)
        elif not (match := _LAYER.fullmatch(name)):
            unknown.append(name)
        elif heads := _HEADS.fullmatch(match[3]):
            target = f"{_TOWERS[match[1]]}.resblocks.{match[2]}.attn.in_proj_{match[4]}"
            fused.setdefault(target, {})[heads[1]] = tensor
        elif match[3] in _BLOCK:
            found[f"{_TOWERS[match[1]]}.resblocks.{match[2]}.{_BLOCK[match[3]]}.{match[4]}"] = tensor
        else:
            unknown.append(name)
    _refuse(unknown, "have no place in open_clip's CLIP")
    _refuse([n for n, parts in fused.items() if not _fit(parts)], "cannot be made of their q, k and v")
    found |= {name: joined([parts[p] for p in "qkv"]) for name, parts in fused.items()}
    return found, dropped


def to_huggingface(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of Hugging Face's CLIPModel.

    Raises:
        MismatchError: a tensor has no place there (a trained head, another architecture).
    """
    found: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in tensors.items():
        if name in _BACK:
            found[_BACK[name]] = tensor
        elif name in _BACK_TRANSPOSED and len(tensor.shape) == 2:
            found[_BACK_TRANSPOSED[name]] = transposed(tensor)
        elif not (match := _RESBLOCK.fullmatch(name)):
            unknown.append(name)
        elif match[3] == "attn.in_proj_" and tensor.shape and tensor.shape[0] % 3 == 0:
            layer = f"{_BACK_TOWERS[match[1]]}.encoder.layers.{match[2]}.self_attn"
            for part, piece in zip("qkv", cut(tensor, 3), strict=True):
                found[f"{layer}.{part}_proj.{match[4]}"] = piece
        elif match[3][:-1] in _BACK_BLOCK:
            layer = f"{_BACK_TOWERS[match[1]]}.encoder.layers.{match[2]}"
            found[f"{layer}.{_BACK_BLOCK[match[3][:-1]]}.{match[4]}"] = tensor
        else:
            unknown.append(name)
    _refuse(unknown, "have no place in Hugging Face's CLIPModel")
    return found


def _fit(parts: Mapping[str, Tensor]) -> bool:
    kinds = {(tensor.dtype, tensor.shape) for tensor in parts.values()}
    return set(parts) == set("qkv") and len(kinds) == 1 and bool(next(iter(kinds))[1])


def _refuse(names: list[str], why: str) -> None:
    if names:
        shown = ", ".join(repr(name[:120]) for name in sorted(names)[:8])
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        raise MismatchError(f"{len(names)} tensors {why}: {shown}{more}", hint=_HINT)


_HINT = "this layout is read for CLIP with two transformer towers; convert other models with their own tools"
