"""What open_clip's tensor names say: which tower, which block; and the patterns that pick names.

A pattern is a shell glob (`visual.*`), a tower (`visual`, `text`, `head`), or blocks of one
(`visual.block[3]`, `text.block[0:6]`, half-open like Python's slices).
"""

import re
from collections.abc import Collection, Iterable, Sequence, Set
from fnmatch import fnmatchcase
from functools import lru_cache

TOWERS = ("visual", "text", "head", "other")

PARTS = {
    "visual": "image tower",
    "visual.proj": "image projection",
    "text": "text tower",
    "text_projection": "text projection",
    "transformer.*": "text transformer",
    "head": "classification head",
    "other": "logit scale",
}
"""What a checkpoint may lack as a whole: pattern → in words."""

_PROJECTIONS = {"visual": ("visual.proj", "text"), "text": ("text_projection", "visual")}
"""Tower → its projection, and the other tower: one that is published alone may lack both."""

IMAGE_POSITIONS, TEXT_POSITIONS = (
    "visual.positional_embedding",
    ("positional_embedding", "text.positional_embedding"),
)
POSITIONS = (IMAGE_POSITIONS, *TEXT_POSITIONS)
"""open_clip's positional embeddings, a row a position."""

_BLOCK = re.compile(r"(?:^|\.)(?:resblocks|blocks|layers|layer|stages)\.?(\d+)\.")
_TEXT = ("transformer.", "token_embedding.", "ln_final.", "text.", "positional_embedding", "text_projection")
_FUSED = {"in_proj_weight": 3, "qkv.weight": 3, "attn_pool.kv.weight": 2}
"""Ends of names of tensors that hold several matrices of attention, and how many."""
_SHORT = re.compile(r"(visual|text)\.block\[(?:(\d+)|(\d*):(\d*))\]")


def tower_of(name: str) -> str:
    """`visual`, `text`, `head` (a trained classification head) or `other` (logit_scale, logit_bias)."""
    if name.startswith("visual."):
        return "visual"
    if name.startswith("classification_head."):
        return "head"
    return "text" if name.startswith(_TEXT) else "other"


def block_of(name: str) -> int | None:
    """Return the number of the transformer block (or ResNet stage) that the tensor belongs to, None outside blocks."""
    match = _BLOCK.search(name)
    return int(match.group(1)) if match else None


def absent_parts(missing: Set[str], names: Collection[str]) -> tuple[str, ...] | None:
    """Return the patterns of `PARTS` that `missing` consists of; None where a tensor inside a tower is among it.

    Encoders are published without their text tower, or with all of it but the transformer (wise-ft, model-soups,
    task_vectors); Hugging Face's CLIPVisionModel and CLIPTextModel have no projection either.

    Args:
        names: all names of the model, the missing ones included.
    """
    absent = []
    for tower in TOWERS:
        gone, whole = ({name for name in of if tower_of(name) == tower} for of in (missing, names))
        if gone and gone == whole:
            absent.append(tower)
        elif tower == "text" and gone and gone == {name for name in whole if name.startswith("transformer.")}:
            absent.append("transformer.*")
        elif (
            (projection := _PROJECTIONS.get(tower))
            and gone == {projection[0]}
            and all(tower_of(name) != projection[1] or name in missing for name in names)
        ):
            absent.append(projection[0])
        elif gone:
            return None
    return tuple(absent) if {"visual", "text", "transformer.*", "head"} & set(absent) else None


def matrices_of(name: str, shape: Sequence[int], *, fused: bool = False) -> int:
    """Return how many matrices (out, in) stand one below the other in a tensor; 0 where it is none.

    A matrix has two dimensions and is no `text_projection`: so positional and token embeddings and `visual.proj` are
    matrices, convolutions, norms and biases are not. q, k and v in one tensor (k and v in timm's pooling) count apart.

    Args:
        fused: count them as one, as the published numbers with open_clip checkpoints do.
    """
    if len(shape) != 2 or "text_projection" in name:
        return 0
    parts = next((count for end, count in _FUSED.items() if name.endswith(end)), 1)
    return 1 if fused or shape[0] % parts else parts


def is_transposed(name: str) -> bool:
    """Return whether a matrix is stored (in, out): open_clip's projections are plain parameters, `x @ proj`."""
    return name.endswith(("visual.proj", "text_projection"))


def depths_of(names: Iterable[str]) -> dict[str, float]:
    """Return how deep each tensor in a block lies, from 0 (the tower's first block) to 1 (its last)."""
    blocks = {name: (tower_of(name), block) for name in names if (block := block_of(name)) is not None}
    numbers: dict[str, list[int]] = {}
    for tower, block in sorted(set(blocks.values())):
        numbers.setdefault(tower, []).append(block)
    return {
        name: numbers[tower].index(block) / max(len(numbers[tower]) - 1, 1)
        for name, (tower, block) in blocks.items()
    }


def lacks_text(names: Collection[str]) -> bool:
    """Return whether there is no text transformer among the names, as in the encoders that papers publish."""
    return not any(name.startswith(("transformer.", "text.")) for name in names)


def lone_tower(names: Collection[str]) -> str | None:
    """Return "visual" or "text" where the names are those of this tower alone."""
    towers = {tower_of(name) for name in names} - {"other"}
    return towers.pop() if len(towers) == 1 and towers <= {"visual", "text"} else None


@lru_cache(maxsize=65536)
def matches(pattern: str, name: str) -> bool:
    """Return whether the pattern picks the name."""
    if pattern in TOWERS:
        return tower_of(name) == pattern
    short = _SHORT.fullmatch(pattern)
    if short is None:
        return fnmatchcase(name, pattern)
    tower, one, start, stop = short.groups()
    block = block_of(name)
    if tower_of(name) != tower or block is None:
        return False
    if one is not None:
        return block == int(one)
    return int(start or 0) <= block and (not stop or block < int(stop))
