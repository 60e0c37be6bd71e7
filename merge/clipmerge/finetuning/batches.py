"""Which items, with which prompts, at which step: a function of the seed, so that nothing of it needs saving."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from clipmerge.errors import TrainingError
from clipmerge.types import Ints

__all__ = ["Batch", "Sampler", "fit_batch"]


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
        order = generator.permutation(len(self.labels)).astype(np.int64)
        return order, self.first + generator.integers(self.count, size=len(self.labels))


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
