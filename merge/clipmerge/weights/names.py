"""What open_clip's tensor names say: which tower, which block; and the patterns that pick names.

A pattern is a shell glob (`visual.*`), a tower (`visual`, `text`, `head`), or blocks of one
(`visual.block[3]`, `text.block[0:6]`, half-open like Python's slices).
"""

import re
from collections.abc import Collection, Set
from fnmatch import fnmatchcase
from functools import lru_cache

TOWERS = ("visual", "text", "head", "other")

PARTS = {
    "visual": "image tower",
    "visual.proj": "image projection",
    "text": "text tower",
    "transformer.*": "text transformer",
    "head": "classification head",
    "other": "logit scale",
}
"""What a checkpoint may lack as a whole: pattern → in words."""

_BLOCK = re.compile(r"(?:^|\.)(?:resblocks|blocks|layers|layer|stages)\.?(\d+)\.")
_TEXT = ("transformer.", "token_embedding.", "ln_final.", "text.", "positional_embedding", "text_projection")
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
    task_vectors); Hugging Face's CLIPVisionModel has no projection either.

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
        elif gone == {"visual.proj"} and all(tower_of(name) != "text" or name in missing for name in names):
            absent.append("visual.proj")
        elif gone:
            return None
    return tuple(absent) if {"visual", "text", "transformer.*", "head"} & set(absent) else None


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
