"""The losses of the steps: written to the log now and then, and checked before anything is kept."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from clipmerge.distributed import all_gather_object
from clipmerge.errors import TrainingError
from clipmerge.finetuning.batches import Batch
from clipmerge.finetuning.log import Log
from clipmerge.text import and_more

__all__ = ["StepLog"]


@dataclass
class StepLog:
    """Write a line of losses now and then, and stop a run whose loss is not finite.

    Losses stay on the device until a line is due: reading each would make the GPU wait for the host.

    Attributes:
        names: of the items, for the error.
        every: steps a line; `steps` in all; `images` a step.
    """

    log: Log
    names: Sequence[str]
    every: int
    steps: int
    images: int
    began: float = field(default_factory=perf_counter)
    waited: float = 0.0
    pending: list[tuple[int, float, list[Batch], Tensor]] = field(default_factory=list)

    def add(self, step: int, lr: float, micro: Sequence[tuple[Batch, Tensor]], waited: float) -> None:
        """Remember a step's losses; every so often write a line."""
        loss = torch.stack([loss for _, loss in micro]).mean()
        self.pending.append((step, lr, [batch for batch, _ in micro], loss))
        if len(self.pending) >= self.every:
            self.check(waited)

    def check(self, waited: float | None = None) -> None:
        """Look at the losses since the last look. All ranks call it, at the same steps.

        Raises:
            TrainingError: one is not finite, on some rank; the first is named with its items.
        """
        if not self.pending:
            return
        losses = torch.stack([loss for *_, loss in self.pending]).tolist()
        lines = zip(self.pending, losses, strict=True)
        problem = next((self._describe(*line, loss) for line, loss in lines if not isfinite(loss)), None)
        for message in all_gather_object(problem):  # a rank that stopped alone would leave the others waiting
            if message is not None:
                hint = "look at these images; else lower --lr, use --clip-grad 1, or --precision fp32"
                raise TrainingError(message, hint=hint)
        step, lr, _, _ = self.pending[-1]
        seconds = perf_counter() - self.began
        line: dict[str, Any] = {"loss": sum(losses) / len(losses), "lr": lr, "steps": self.steps}
        line["images_per_second"] = len(self.pending) * self.images / seconds
        line["seconds_left"] = (self.steps - step - 1) * seconds / len(self.pending)
        if waited is not None:
            line["waiting"] = (waited - self.waited) / seconds
            self.waited = waited
        self.log("step", step + 1, **line)
        self.pending.clear()
        self.began = perf_counter()

    def _describe(self, step: int, lr: float, batches: Sequence[Batch], _: Tensor, loss: float) -> str:
        items = [self.names[i] for batch in batches for i in batch.items]
        self.log("stopped", step + 1, loss=str(loss), lr=lr, items=items)
        return f"the loss is {loss} at step {step + 1} with learning rate {lr:.3g}, on {and_more(items)}"
