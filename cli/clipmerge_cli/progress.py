"""The library's `on_progress(what, done, total)` as Rich bars on stderr; silent where nobody watches."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Any

from clipmerge_cli.show import percent, say

if TYPE_CHECKING:
    from clipmerge.types import Progress as OnProgress

OnEvent = Callable[[Mapping[str, Any]], None]


@contextmanager
def progress(
    *, quiet: bool = False, title: str | None = None, notes: Mapping[str, str] | None = None
) -> "Iterator[OnProgress | None]":
    """Yield a callback for long work, or None where stderr is no terminal or `quiet`.

    Each distinct `what` is one bar, with `title` before it and the current `notes` after it; until the first, a line
    says that something is loading. Bars vanish when the block ends, so that the result stands alone; nothing that
    matters afterwards is said by them alone. Workers may report from several threads.
    """
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, Task, TaskID, TimeElapsedColumn, TimeRemainingColumn
    from rich.text import Text

    class Left(TimeRemainingColumn):
        def render(self, task: Task) -> Text:
            return Text.assemble("about ", super().render(task), " left") if task.total else Text()

    columns = ("{task.description}", BarColumn(20), "{task.fields[count]}", "elapsed", TimeElapsedColumn())
    bars = Progress(*columns, Left(), console=Console(stderr=True), transient=True)
    tasks: dict[str, TaskID] = {}
    lock = Lock()

    def update(what: str, done: int, total: int) -> None:
        with lock:
            if what not in tasks:
                if "" in tasks:
                    bars.remove_task(tasks.pop(""))
                tasks[what] = bars.add_task(f"{title}: {what}" if title else what, count="")
            count = "  ".join((_count(done, total), *(notes or {}).values()))
            bars.update(tasks[what], completed=done, total=total or None, count=count)

    with bars:
        tasks[""] = bars.add_task(title or "loading …", total=None, count="")
        yield update


@contextmanager
def training(*, quiet: bool = False) -> "Iterator[tuple[OnProgress | None, OnEvent | None]]":
    """Yield callbacks for `finetune`: a live line at a terminal, scores as plain lines elsewhere, none if quiet."""
    notes: dict[str, str] = {}

    def on_event(event: Mapping[str, Any]) -> None:
        if event["event"] == "step":
            notes["step"] = f"loss {event['loss']:.3f}  {event['images_per_second']:.0f} images/s"
        elif event["event"] == "score":
            notes["score"] = f"held-out {percent(event['top1'])} %"
            if on_progress is None:
                say(f"step {event['step']}: {notes['score']}, loss {event['loss']:.3f}")

    with progress(quiet=quiet, notes=notes) as on_progress:
        yield on_progress, None if quiet else on_event


def _count(done: int, total: int) -> str:
    """Return `3/10`, or a percentage where the numbers are too long to read (bytes)."""
    if not total:
        return str(done) if done else ""
    return f"{done}/{total}" if total < 100_000 else f"{100 * done // total} %"
