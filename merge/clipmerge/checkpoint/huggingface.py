"""Names of Hugging Face's CLIPModel and SiglipModel ↔ open_clip's.

Besides names, q, k and v are apart (open_clip and timm keep them in one), CLIP's two projections are transposed, and
SigLIP's two numbers and its positions have an axis more or less. All are views: nothing is read.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from clipmerge.checkpoint.tensors import Tensor
from clipmerge.checkpoint.views import concatenate, reshape, split, transpose
from clipmerge.errors import MismatchError
from clipmerge.text import and_more


@dataclass(frozen=True)
class _Tower:
    """A tower's blocks in open_clip: what stands before their numbers, the parts of one, and where q, k, v are."""

    blocks: str
    parts: Mapping[str, str]
    fused: str


@dataclass(frozen=True)
class _Model:
    """The names of one of transformers' classes → open_clip's."""

    name: str
    plain: Mapping[str, str]
    towers: Mapping[str, _Tower]
    transposed: Mapping[str, str] = field(default_factory=dict)
    scalars: Mapping[str, str] = field(default_factory=dict)
    """Shape (1,) → ()."""
    batched: Mapping[str, str] = field(default_factory=dict)
    """Shape (n, width) → (1, n, width)."""
    pooling: Mapping[str, str] = field(default_factory=dict)
    """q, k and v in one → q, and k and v, in two, which stand in the places of {}."""


_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}
_TIMM_BLOCK = {
    "layer_norm1": "norm1",
    "layer_norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
    "self_attn.out_proj": "attn.proj",
}


def _both(modules: Mapping[str, str]) -> dict[str, str]:
    return {
        f"{theirs}.{part}": f"{ours}.{part}"
        for theirs, ours in modules.items()
        for part in ("weight", "bias")
    }


_CLIP = _Model(
    "CLIPModel",
    {
        "logit_scale": "logit_scale",
        "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "positional_embedding",
        "vision_model.embeddings.class_embedding": "visual.class_embedding",
        "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
        "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
        **_both(
            {
                "text_model.final_layer_norm": "ln_final",
                "vision_model.pre_layrnorm": "visual.ln_pre",
                "vision_model.post_layernorm": "visual.ln_post",
            }
        ),
    },
    {
        "text_model": _Tower("transformer.resblocks", _BLOCK, "attn.in_proj_"),
        "vision_model": _Tower("visual.transformer.resblocks", _BLOCK, "attn.in_proj_"),
    },
    transposed={"text_projection.weight": "text_projection", "visual_projection.weight": "visual.proj"},
)
_SIGLIP = _Model(
    "SiglipModel",
    {
        "text_model.embeddings.token_embedding.weight": "text.token_embedding.weight",
        "text_model.embeddings.position_embedding.weight": "text.positional_embedding",
        "vision_model.head.probe": "visual.trunk.attn_pool.latent",
        **_both(
            {
                "text_model.final_layer_norm": "text.ln_final",
                "text_model.head": "text.text_projection",
                "vision_model.embeddings.patch_embedding": "visual.trunk.patch_embed.proj",
                "vision_model.post_layernorm": "visual.trunk.norm",
                "vision_model.head.attention.out_proj": "visual.trunk.attn_pool.proj",
                "vision_model.head.layernorm": "visual.trunk.attn_pool.norm",
                "vision_model.head.mlp.fc1": "visual.trunk.attn_pool.mlp.fc1",
                "vision_model.head.mlp.fc2": "visual.trunk.attn_pool.mlp.fc2",
            }
        ),
    },
    {
        "text_model": _Tower("text.transformer.resblocks", _BLOCK, "attn.in_proj_"),
        "vision_model": _Tower("visual.trunk.blocks", _TIMM_BLOCK, "attn.qkv."),
    },
    scalars={"logit_scale": "logit_scale", "logit_bias": "logit_bias"},
    batched={"vision_model.embeddings.position_embedding.weight": "visual.trunk.pos_embed"},
    pooling={
        f"vision_model.head.attention.in_proj_{part}": f"visual.trunk.attn_pool.{{}}.{part}"
        for part in ("weight", "bias")
    },
)
_LAYER = re.compile(r"(text_model|vision_model)\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)")
_QKV = re.compile(r"self_attn\.([qkv])_proj")
_NAFLEX = "vision_model.embeddings.patch_embedding.weight"


def from_huggingface(
    tensors: Mapping[str, Tensor], *, siglip: bool = False
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors under open_clip's names, and the names that have no place in open_clip's model, sorted.

    Args:
        siglip: they are SigLIP's, also where no name tells (blocks alone have the same names in both).

    Raises:
        MismatchError: one of q, k, v is missing or different, where every name has a place.
    """
    models = (_SIGLIP,) if siglip else (_CLIP, _SIGLIP)
    model = max(models, key=lambda known: len(known.plain.keys() & tensors.keys()))
    ours: dict[str, Tensor] = {}
    fused: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for name, tensor in tensors.items():
        layer, shape = _LAYER.fullmatch(name), tensor.shape
        if model is _SIGLIP and name == _NAFLEX and len(shape) != 4:
            unknown.append(name)  # images of any shape (NaFlex): their patches are cut outside the model
        elif name in model.plain:
            ours[model.plain[name]] = tensor
        elif name in model.transposed and len(shape) == 2:
            ours[model.transposed[name]] = transpose(tensor)
        elif name in model.scalars and shape in ((1,), ()):
            ours[model.scalars[name]] = reshape(tensor, ())
        elif name in model.batched and len(shape) == 2:
            ours[model.batched[name]] = reshape(tensor, (1, *shape))
        elif name in model.pooling and shape and shape[0] % 3 == 0:
            query, *rest = split(tensor, 3)
            ours[model.pooling[name].format("q")] = query
            ours[model.pooling[name].format("kv")] = concatenate(rest)
        elif layer and (qkv := _QKV.fullmatch(layer[3])):
            tower = model.towers[layer[1]]
            fused.setdefault(f"{tower.blocks}.{layer[2]}.{tower.fused}{layer[4]}", {})[qkv[1]] = tensor
        elif layer and layer[3] in model.towers[layer[1]].parts:
            tower = model.towers[layer[1]]
            ours[f"{tower.blocks}.{layer[2]}.{tower.parts[layer[3]]}.{layer[4]}"] = tensor
        else:
            unknown.append(name)
    if unknown:
        return ours, sorted(unknown)
    _refuse([name for name, parts in fused.items() if not _fit(parts)], "cannot be made of their q, k and v")
    ours |= {name: concatenate([parts[letter] for letter in "qkv"]) for name, parts in fused.items()}
    return ours, []


def to_huggingface(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors under the names of Hugging Face's CLIPModel, or of its SiglipModel where they are SigLIP's.

    Raises:
        MismatchError: a tensor has no place there (a trained head, another architecture).
    """
    model = _SIGLIP if "visual.trunk.attn_pool.latent" in tensors else _CLIP
    plain, transposed, scalars, batched = (
        {ours: theirs for theirs, ours in table.items()}
        for table in (model.plain, model.transposed, model.scalars, model.batched)
    )
    theirs: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in tensors.items():
        shape = tensor.shape
        if name in plain:
            theirs[plain[name]] = tensor
        elif name in transposed and len(shape) == 2:
            theirs[transposed[name]] = transpose(tensor)
        elif name in scalars and shape in ((1,), ()):
            theirs[scalars[name]] = reshape(tensor, (1,))
        elif name in batched and len(shape) == 3 and shape[0] == 1:
            theirs[batched[name]] = reshape(tensor, shape[1:])
        elif block := _block_of(model, name, tensor):
            theirs |= block
        else:
            unknown.append(name)
    for fused, place in model.pooling.items():
        query, rest = (tensors.get(place.format(word)) for word in ("q", "kv"))
        if query and rest and query.dtype == rest.dtype:
            theirs[fused] = concatenate([query, rest])
            unknown = [name for name in unknown if name not in (place.format("q"), place.format("kv"))]
    _refuse(unknown, f"have no place in Hugging Face's {model.name}")
    return theirs


def _block_of(model: _Model, name: str, tensor: Tensor) -> dict[str, Tensor]:
    """What a tensor of a tower's block is in transformers' names; {} where it is none."""
    for word, tower in model.towers.items():
        match = re.fullmatch(rf"{re.escape(tower.blocks)}\.(\d+)\.(.+)", name)
        if not match:
            continue
        layer = f"{word}.encoder.layers.{match[1]}"
        part, _, kind = match[2].rpartition(".")
        if match[2] in (f"{tower.fused}weight", f"{tower.fused}bias"):
            kind = match[2].removeprefix(tower.fused)
            if not tensor.shape or tensor.shape[0] % 3:
                return {}
            pieces = zip("qkv", split(tensor, 3), strict=True)
            return {f"{layer}.self_attn.{letter}_proj.{kind}": piece for letter, piece in pieces}
        theirs = {ours: own for own, ours in tower.parts.items()}.get(part)
        return {f"{layer}.{theirs}.{kind}": tensor} if theirs and kind in ("weight", "bias") else {}
    return {}


def _fit(parts: Mapping[str, Tensor]) -> bool:
    kinds = {(tensor.dtype, tensor.shape) for tensor in parts.values()}
    return set(parts) == set("qkv") and len(kinds) == 1 and bool(next(iter(kinds))[1])


def _refuse(names: list[str], why: str) -> None:
    if names:
        raise MismatchError(
            f"{len(names)} tensors {why}: {and_more([repr(name[:120]) for name in sorted(names)])}",
            hint="this layout is read for CLIP with two transformers and SigLIP; convert others with their own tools",
        )
