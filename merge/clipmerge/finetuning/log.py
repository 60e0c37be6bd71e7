"""What happened, one JSON object a line, beside the checkpoint."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clipmerge.errors import MissingExtraError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Log", "read"]

Event = Mapping[str, Any]


def read(path: str | Path) -> list[dict[str, Any]]:
    """The events of a training log; a last line that was cut off is left out."""
    events = []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            events.append(json.loads(line))
        except ValueError:
            break
    return events


class Log:
    """Appends events to a JSONL file, to TensorBoard where asked, and hands them to whoever listens.

    Args:
        path: None writes no file (ranks other than the first).
        tensorboard: folder for TensorBoard's event files.
    """

    def __init__(
        self,
        path: Path | None,
        *,
        tensorboard: str | Path | None = None,
        on_event: "Callable[[Event], None] | None" = None,
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
        """One event of one step."""
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
