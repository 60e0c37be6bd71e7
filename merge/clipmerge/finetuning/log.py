"""What happened during a run: one JSON object a line, beside the checkpoint."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from time import perf_counter
from typing import Any, TypeAlias

import torch
from torch import Tensor

from clipmerge.distributed import all_gather_object
from clipmerge.errors import MissingExtraError, TrainingError
from clipmerge.finetuning.batches import Batch
from clipmerge.text import and_more

__all__ = ["Event", "Log", "StepLog", "read"]

Event: TypeAlias = Mapping[str, Any]


def read(path: str | Path) -> list[dict[str, Any]]:
    """Return the events of a training log; a last line that was cut off is left out."""
    events = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            break
    return events


class Log:
    """Append events to a JSONL file, to TensorBoard where asked, and hand them to `on_event`.

    Args:
        path: None writes no file (ranks other than the first).
        tensorboard: folder for TensorBoard's event files.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        tensorboard: str | Path | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> None:
        self.path = path
        self.on_event = on_event
        self.board = _board(tensorboard) if tensorboard is not None and path is not None else None

    def begin(self, step: int) -> None:
        """Keep what was written up to this step of a resumed run; at step 0 start the file anew."""
        if self.path is not None:
            kept = read(self.path) if step and self.path.exists() else []
            lines = [json.dumps(event) for event in kept if event.get("step", 0) <= step]
            self.path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")

    def __call__(self, event: str, step: int, **values: Any) -> None:
        """Record an event of a step."""
        line = {"event": event, "step": step, **values}
        if self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        if self.board is not None:
            for name, value in values.items():
                if isinstance(value, (int, float)):
                    self.board.add_scalar(f"{event}/{name}", value, step)
        if self.on_event is not None:
            self.on_event(line)

    def close(self) -> None:
        """Flush what TensorBoard holds back."""
        if self.board is not None:
            self.board.close()


def _board(folder: str | Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("tensorboard", extra="tensorboard", what="the TensorBoard log") from error
    return SummaryWriter(str(folder))


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
