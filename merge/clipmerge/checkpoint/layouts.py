"""Whose names a file uses, and the way from them to open_clip's.

| layout        | names                                                                     |
|---------------|---------------------------------------------------------------------------|
| `open_clip`   | as they are; `module.` in training checkpoints, `_orig_mod.` when compiled |
| `openai`      | the same, and `input_resolution`, `context_length`, `vocab_size`          |
| `model-soups` | `[module.]model.…` and `classification_head.…`                            |
| `wise-ft`     | `image_encoder.model.…` and `classification_head.…` (patching, FLYP too)   |
| `task-vectors`| `model.…` (and TALL, TSV, Iso, LiNeS)                                     |
| `head`        | `weight` and `bias` alone: a file of its own for a classification head    |
| `huggingface` | CLIPModel's, see `huggingface.py`                                         |
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from clipmerge.checkpoint.huggingface import from_huggingface
from clipmerge.checkpoint.tensors import Tensor
from clipmerge.errors import MismatchError

WRAPPERS = ("module", "_orig_mod", "image_encoder", "model")
"""First words that only say what wrapped the model."""

_HUGGING_FACE = ("text_model.e", "vision_model.e")
_OPENAI = frozenset({"input_resolution", "context_length", "vocab_size"})
_MASKS = frozenset({"attn_mask", "text.attn_mask"})
"""Computed, not learned: saved by old versions and by TorchScript, in no model's state dict today."""


@dataclass(frozen=True, slots=True)
class Named:
    """Tensors under open_clip's names, the layout they came in, and the names that were left out."""

    tensors: dict[str, Tensor]
    layout: str
    dropped: tuple[str, ...] = ()


def to_open_clip(tensors: Mapping[str, Tensor]) -> Named:
    """Return the tensors under open_clip's names, sorted.

    Raises:
        MismatchError: two names become one, or a name of Hugging Face's has no place in open_clip's model.
    """
    if 0 < len(tensors) <= 2 and tensors.keys() <= {"weight", "bias"} and "weight" in tensors:
        return Named({f"classification_head.{name}": t for name, t in sorted(tensors.items())}, "head")
    bare, seen = _unwrapped(tensors)
    if any(name.startswith(_HUGGING_FACE) for name in bare):
        renamed, dropped = from_huggingface(bare)
        return Named(dict(sorted(renamed.items())), "huggingface", tuple(sorted(dropped)))
    dropped = sorted(bare.keys() & (_OPENAI | _MASKS))
    ours = {name: bare[name] for name in sorted(bare) if name not in dropped}
    return Named(ours, _layout(ours, seen, dropped), tuple(dropped))


def _unwrapped(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], set[str]]:
    """Names without their wrappers' words, and which words there were."""
    unwrapped: dict[str, Tensor] = {}
    origin: dict[str, str] = {}
    seen: set[str] = set()
    for name, tensor in tensors.items():
        words = name.split(".")
        while len(words) > 1 and words[0] in WRAPPERS:
            seen.add(words.pop(0))
        bare = ".".join(words)
        if bare in unwrapped:
            raise MismatchError(
                f"{origin[bare][:120]!r} and {name[:120]!r} both stand for {bare[:120]!r}",
                hint="the file holds two models (an averaged copy?); save the one you want alone",
            )
        unwrapped[bare], origin[bare] = tensor, name
    return unwrapped, seen


def _layout(names: Iterable[str], seen: set[str], dropped: list[str]) -> str:
    if "image_encoder" in seen:
        return "wise-ft"
    if "model" in seen:
        return "model-soups" if any(n.startswith("classification_head.") for n in names) else "task-vectors"
    return "openai" if _OPENAI & set(dropped) else "open_clip"
