"""What open_clip's tensor names say: which tower, which block; and the patterns that pick names.

A pattern is a shell glob (`visual.*`), a tower (`visual`, `text`, `head`), or blocks of one
(`visual.block[3]`, `text.block[0:6]`, half-open like Python's slices).
"""

import re
from fnmatch import fnmatchcase
from functools import lru_cache

TOWERS = ("visual", "text", "head", "other")

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
