"""Whose names a file uses, and the way from them to open_clip's.

| layout        | names                                                                     |
|---------------|---------------------------------------------------------------------------|
| `open_clip`   | as they are; words of wrappers are taken off before, see `sets.py`         |
| `openai`      | the same, and `input_resolution`, `context_length`, `vocab_size`          |
| `model-soups` | `[module.]model.…` and `classification_head.…`                            |
| `wise-ft`     | `image_encoder.model.…` and `classification_head.…` (patching, FLYP too)   |
| `task-vectors`| `model.…` (and TALL, TSV, Iso, LiNeS)                                     |
| `head`        | `weight` and `bias` alone: a file of its own for a classification head    |
| `huggingface` | CLIPModel's and SiglipModel's, see `huggingface.py`                       |
| `transformers`| of a model that has no place in open_clip: names stay as they are          |
"""

from collections.abc import Iterable
from dataclasses import dataclass

from clipmerge.checkpoint.huggingface import from_huggingface
from clipmerge.checkpoint.sets import WeightSet
from clipmerge.checkpoint.tensors import Tensor

_HUGGING_FACE = ("text_model.e", "vision_model.e")
_ONE_TOWER = {
    "embeddings.class_embedding": "vision_model.",
    "head.probe": "vision_model.",
    "embeddings.token_embedding.weight": "text_model.",
}
"""transformers 5 saves CLIPVisionModel, SiglipVisionModel and CLIPTextModel without their tower's name: mark → name."""
_OPENAI = frozenset({"input_resolution", "context_length", "vocab_size"})
_MASKS = frozenset({"attn_mask", "text.attn_mask"})
"""Computed, not learned: saved by old versions and by TorchScript, in no model's state dict today."""


@dataclass(frozen=True, slots=True)
class Named:
    """Tensors under open_clip's names, the layout they came in, and the names that were left out.

    `without_place` are the names for which open_clip has no place: the reason why all kept their own names.
    """

    tensors: dict[str, Tensor]
    layout: str
    dropped: tuple[str, ...] = ()
    without_place: tuple[str, ...] = ()


def to_open_clip(weights: WeightSet, *, siglip: bool = False) -> Named:
    """Return the tensors under open_clip's names, sorted; under their own where some of them have no place there.

    Args:
        siglip: names of transformers' are SigLIP's, also where none of them tells.

    Raises:
        MismatchError: one of Hugging Face's q, k and v is missing or different.
    """
    bare = weights.tensors
    if 0 < len(bare) <= 2 and bare.keys() <= {"weight", "bias"} and "weight" in bare:
        return Named({f"classification_head.{name}": t for name, t in sorted(bare.items())}, "head")
    for mark, tower in _ONE_TOWER.items():
        if mark in bare and any(name.startswith("encoder.layers.") for name in bare):
            return _from_huggingface(weights, tower)
    if any(name.startswith(_HUGGING_FACE) for name in bare):
        return _from_huggingface(weights, siglip=siglip)
    dropped = sorted(bare.keys() & (_OPENAI | _MASKS))
    ours = {name: bare[name] for name in sorted(bare) if name not in dropped}
    return Named(ours, _layout(ours, weights.words, dropped), (*dropped, *sorted(weights.dropped)))


def _from_huggingface(weights: WeightSet, tower: str = "", *, siglip: bool = False) -> Named:
    """Translate names; where one of them has no place, all stay as their author's library has them.

    Args:
        tower: what stands before the names in a CLIPModel.

    A merge needs equal names, not open_clip's: only scoring and finetuning build a model.
    """
    bare, masks = weights.tensors, [name for name in weights.tensors if name.endswith(".position_ids")]
    dropped = tuple(sorted([*masks, *weights.dropped]))
    learned = {tower + name: tensor for name, tensor in bare.items() if name not in masks}
    renamed, unknown = from_huggingface(learned, siglip=siglip)
    if not unknown:
        return Named(dict(sorted(renamed.items())), "huggingface", dropped)
    own = {
        name: weights.wrapped[name]
        for name in sorted(weights.wrapped)
        if name.rpartition(".")[2] != "position_ids"
    }
    return Named(own, "transformers", dropped, tuple(unknown))


def _layout(names: Iterable[str], seen: set[str], dropped: list[str]) -> str:
    if "image_encoder" in seen:
        return "wise-ft"
    if "model" in seen:
        return "model-soups" if any(n.startswith("classification_head.") for n in names) else "task-vectors"
    return "openai" if _OPENAI & set(dropped) else "open_clip"
