"""Which items, with which prompts, at which step: a function of the seed, so that nothing of it needs saving."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
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

__all__ = [
    "Batch", "Prompts", "Sampler", "Tokenizer", "fit_batch", "set_shares", "tokenizer_of", "training_prompts",
    "unique_prompts",
]  # fmt: skip

Tokenizer: TypeAlias = Callable[[list[str]], Tensor]


@dataclass(frozen=True)
class Batch:
    """One micro-batch over all ranks, on the host: item numbers, the prompt drawn for each, and its label."""

    step: int
    epoch: int
    items: Ints
    prompts: Ints
    labels: Ints


@dataclass(frozen=True)
class Sampler:
    """Shuffle epochs into whole batches; what is left over at the end of an epoch is left out.

    Attributes:
        first, count: item i draws among prompts first[i] … first[i] + count - 1.
        batch: items of one micro-batch over all ranks; `micro` of them make a step.
        sets: (items, share) of each set of joined images, where an epoch holds a share of each and not every item
            once. A set's items all come before one of them comes again, through as many epochs as that takes.
    """

    labels: Ints
    first: Ints
    count: int
    seed: int
    batch: int
    micro: int = 1
    sets: tuple[tuple[int, float], ...] = ()

    @property
    def steps_per_epoch(self) -> int:
        return max(1, len(self.labels) // (self.batch * self.micro))

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Yield the micro-batches of steps `start` … `stop` - 1."""
        epoch = -1
        for step in range(start, stop):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order, drawn = self._shuffle(epoch)
            at = (step % self.steps_per_epoch) * self.batch * self.micro
            for piece in range(self.micro):
                items = order[at + piece * self.batch : at + (piece + 1) * self.batch]
                yield Batch(step, epoch, items, drawn[items], self.labels[items])

    def _shuffle(self, epoch: int) -> tuple[Ints, Ints]:
        generator = np.random.default_rng([self.seed, epoch])
        items = self._share_of_each(epoch) if self.sets else np.arange(len(self.labels))
        order = generator.permutation(items).astype(np.int64)
        return order, self.first + generator.integers(self.count, size=len(self.labels))

    def _share_of_each(self, epoch: int) -> Ints:
        """Return the items of an epoch: of each set the next ones of an endless row of its shuffles."""
        chosen, begin, shared = [], 0, 0.0
        total, taken = sum(share for _, share in self.sets), 0
        for number, (size, share) in enumerate(self.sets):
            shared += share
            count = round(len(self.labels) * shared / total) - taken  # together as many as there are items
            taken += count
            first, last = epoch * count, (epoch + 1) * count
            rounds = range(first // size, -(-last // size))
            row = [np.random.default_rng([self.seed, number, r, size]).permutation(size) for r in rounds]
            if row:
                chosen.append(begin + np.concatenate(row)[first - rounds[0] * size :][:count])
            begin += size
        return np.concatenate(chosen).astype(np.int64)


def set_shares(shares: str | Mapping[str, float], sizes: Mapping[str, int]) -> tuple[tuple[int, float], ...]:
    """Return (items, share) of each of several sets, () where every image comes once an epoch.

    Args:
        shares: "size", "root" (of the size), "equal", a number for each set, or these as "cars=3,dtd=1".

    Raises:
        TrainingError: none of these, or not one positive number for each set.
    """
    if shares == "size" or len(sizes) < 2:
        return ()
    numbers: dict[str, float] = {}
    try:
        if isinstance(shares, Mapping):
            numbers = {name: float(share) for name, share in shares.items()}
        elif shares in ("root", "equal"):
            numbers = {name: size**0.5 if shares == "root" else 1.0 for name, size in sizes.items()}
        else:
            numbers = {name: float(share) for name, share in (pair.split("=") for pair in shares.split(","))}
    except ValueError:
        numbers = {}
    if numbers.keys() != sizes.keys() or not all(0 < share < float("inf") for share in numbers.values()):
        raise TrainingError(
            f"{shares!r} gives no share to each of {', '.join(sizes)}",
            hint=f"size, root, equal, or {','.join(f'{name}=1' for name in sizes)}",
        )
    return tuple((size, numbers[name]) for name, size in sizes.items())


def fit_batch(size: int, ranks: int, micro: int, items: int) -> int:
    """Return the micro-batch over all ranks: `size` for each, less where the data are fewer.

    Raises:
        TrainingError: there are fewer items than ranks times accumulated batches.
    """
    fitted = min(size, items // (ranks * micro)) * ranks
    if fitted == 0:
        raise TrainingError(
            f"{items} training images cannot fill {ranks * micro} batches",
            hint="use fewer processes or a smaller --accumulate",
        )
    return fitted


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
        rows = texts_of.class_prompts(split, templates)
        texts, count = [text for row in rows for text in row], len(rows[0])
        first = split.labels * count
    elif split.captions is not None:
        texts, count = list(dict.fromkeys(split.captions)), 1  # equal captions are one prompt
        row = {text: i for i, text in enumerate(texts)}
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
