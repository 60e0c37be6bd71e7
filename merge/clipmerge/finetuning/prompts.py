"""Every prompt that can be drawn for an image, tokenised once."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from clipmerge.data import prompts as texts_of
from clipmerge.data.split import Split
from clipmerge.errors import TrainingError
from clipmerge.evaluate.heads import text_lengths
from clipmerge.model import ModelSpec, get_tokenizer
from clipmerge.types import Ints

if TYPE_CHECKING:
    from jaxtyping import Int

__all__ = ["Prompts", "Tokenizer", "tokenizer_of", "training_prompts", "unique_prompts"]

Tokenizer: TypeAlias = Callable[[list[str]], Tensor]


@dataclass(frozen=True)
class Prompts:
    """Tokens of every prompt, and which of them an item draws from.

    Attributes:
        tokens: on the device that trains.
        lengths: how many tokens each needs, up to and including the end of text.
        first, count: item i draws among prompts first[i] … first[i] + count - 1.
        classes: how many classes the first rows are grouped by, `count` rows each; 0 for captions.
    """

    tokens: "Int[Tensor, 'prompts context']"
    lengths: Ints
    first: Ints
    count: int
    classes: int


def training_prompts(
    model: nn.Module,
    tokenizer: Tokenizer,
    split: Split,
    templates: Sequence[str] | str | None,
    device: torch.device,
) -> Prompts:
    """Return what the text tower is trained on: class names in templates, or captions where there are no classes.

    Raises:
        TrainingError: there are neither classes nor captions.
    """
    if split.classes:
        rows = texts_of.prompts(split.classes, texts_of.templates(templates, split))
        texts, count = [text for row in rows for text in row], len(rows[0])
        first = split.labels * count
    elif split.captions is not None:
        row = {
            text: i for i, text in enumerate(dict.fromkeys(split.captions))
        }  # equal captions are one prompt
        texts, count = list(row), 1
        first = np.array([row[text] for text in split.captions], dtype=np.int64)
    else:
        raise TrainingError(f"{split.source} has neither classes nor captions", hint="name its classes")
    tokens = tokenizer(texts)
    lengths = np.asarray(text_lengths(model, tokens), dtype=np.int64)
    return Prompts(tokens.to(device), lengths, first, count, len(split.classes))


def tokenizer_of(spec: ModelSpec) -> Tokenizer:
    """Return the model's tokenizer; reading its vocabulary takes longer than a tiny model's step, so only once."""
    return _tokenizer(json.dumps(spec.to_metadata()))


@lru_cache(maxsize=4)
def _tokenizer(model: str) -> Tokenizer:
    return get_tokenizer(ModelSpec.from_metadata(json.loads(model)))


def unique_prompts(drawn: Ints, ranks: int = 1, multiple: int = 1) -> tuple[Ints, Ints]:
    """Return the distinct prompts of a batch and, for each item, the position of its prompt among them.

    They are padded with the first one to a multiple of `ranks * multiple`, so that every rank encodes the same
    number; nothing points at the padding, so it has no gradient.
    """
    rows, positions = np.unique(drawn, return_inverse=True)
    padding = -len(rows) % (ranks * multiple)
    return np.concatenate([rows, np.repeat(rows[:1], padding)]), positions.reshape(-1).astype(np.int64)
