"""What happened during a run: one JSON object a line, beside the checkpoint."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from clipmerge.errors import MissingExtraError

__all__ = ["Event", "Log", "read"]

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
