"""Which items, with which prompts, at which step: a pure function of the seed, so nothing of it needs saving."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from clipmerge.errors import TrainingError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from clipmerge.data.split import Split

    Tokenizer = Callable[[list[str]], Tensor]

__all__ = ["Batch", "Prompts", "Sampler", "distinct"]

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """One micro-batch over all ranks, on the host: item numbers, the prompt drawn for each, and its label."""

    step: int
    epoch: int
    items: Ints
    prompts: Ints
    labels: Ints


@dataclass(frozen=True)
class Prompts:
    """Every prompt that can be drawn, tokenised once.

    Attributes:
        tokens: (prompts, context) on the device that trains.
        lengths: (prompts,) how many tokens each needs, up to and including the end of text.
        first, count: item i draws among prompts first[i] … first[i] + count - 1.
        classes: how many classes the first rows are grouped by, `count` rows each; 0 for captions.
    """

    tokens: "Tensor"
    lengths: Ints
    first: Ints
    count: int
    classes: int


def class_prompts(
    split: "Split", texts: Sequence[Sequence[str]], tokenizer: "Tokenizer", model: "nn.Module"
) -> Prompts:
    """Prompts by class: `texts[class][template]`; rows are class-major."""
    count = len(texts[0])
    tokens = tokenizer([text for row in texts for text in row])
    return Prompts(tokens, _lengths(model, tokens), split.labels * count, count, len(texts))


def caption_prompts(split: "Split", tokenizer: "Tokenizer", model: "nn.Module") -> Prompts:
    """One prompt an item: its caption; equal captions are one row."""
    texts = dict.fromkeys(split.captions or ())
    row = {text: i for i, text in enumerate(texts)}
    tokens = tokenizer(list(texts))
    first = np.array([row[text] for text in split.captions or ()], dtype=np.int64)
    return Prompts(tokens, _lengths(model, tokens), first, 1, 0)


def _lengths(model: "nn.Module", tokens: "Tensor") -> Ints:
    from clipmerge.evaluate.heads import text_lengths

    return np.asarray(text_lengths(model, tokens).numpy(), dtype=np.int64)


def distinct(prompts: Ints, ranks: int = 1, multiple: int = 1) -> tuple[Ints, Ints]:
    """The distinct prompts of a batch and, for each item, the row where its prompt stands.

    The rows are padded with the first prompt to a multiple of `ranks * multiple`, so that every rank encodes the
    same number; nothing points at the padding, so it has no gradient.
    """
    rows, where = np.unique(prompts, return_inverse=True)
    short = -len(rows) % (ranks * multiple)
    return np.concatenate([rows, np.repeat(rows[:1], short)]), where.reshape(-1).astype(np.int64)


@dataclass(frozen=True)
class Sampler:
    """Shuffled epochs of whole batches; what is left over at the end of an epoch is left out.

    Attributes:
        batch: items of one micro-batch over all ranks; `micro` of them make a step.
    """

    labels: Ints
    first: Ints
    count: int
    seed: int
    batch: int
    micro: int = 1

    @property
    def steps_per_epoch(self) -> int:
        return max(1, len(self.labels) // (self.batch * self.micro))

    def batches(self, start: int, stop: int) -> Iterator[Batch]:
        """Micro-batches of steps `start` … `stop` - 1."""
        epoch = -1
        for step in range(start, stop):
            if step // self.steps_per_epoch != epoch:
                epoch = step // self.steps_per_epoch
                order, drawn = self._epoch(epoch)
            at = (step % self.steps_per_epoch) * self.batch * self.micro
            for piece in range(self.micro):
                items = order[at + piece * self.batch : at + (piece + 1) * self.batch]
                yield Batch(step, epoch, items, drawn[items], self.labels[items])

    def _epoch(self, epoch: int) -> tuple[Ints, Ints]:
        generator = np.random.default_rng([self.seed, epoch])
        order = generator.permutation(len(self.labels)).astype(np.int64)
        return order, self.first + generator.integers(self.count, size=len(self.labels))


def fitted_batch(size: int, ranks: int, micro: int, items: int) -> int:
    """The micro-batch over all ranks: `size` for each, less where the data are fewer.

    Raises:
        TrainingError: there are fewer items than ranks times accumulated batches.
    """
    if items >= size * ranks * micro:
        return size * ranks
    fitted = items // (ranks * micro) * ranks
    if fitted == 0:
        raise TrainingError(
            f"{items} training images cannot fill {ranks * micro} batches",
            hint="use fewer processes or a smaller --accumulate",
        )
    return fitted
