"""The library's `on_progress(what, done, total)` as Rich bars on stderr; silent where nobody watches."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Lock
from typing import TYPE_CHECKING, Any

from clipmerge_cli.show import say

if TYPE_CHECKING:
    from clipmerge.types import Progress

OnEvent = Callable[[Mapping[str, Any]], None]


@contextmanager
def progress(*, quiet: bool = False, title: str | None = None) -> Iterator["Progress | None"]:
    """Yield a callback for long work, or None where stderr is no terminal or `quiet`.

    Each distinct `what` is one bar, with `title` before it; bars vanish when the block ends, so that the result
    stands alone.
    """
    if quiet or not sys.stderr.isatty():
        yield None
    else:
        with _Bars(title) as bars:
            yield bars.update


@contextmanager
def training(*, quiet: bool = False) -> Iterator[tuple["Progress | None", OnEvent | None]]:
    """Yield callbacks for `finetune`: a live line at a terminal, scores as plain lines elsewhere, none if quiet."""
    if quiet or not sys.stderr.isatty():
        yield None, None if quiet else _say_score
        return
    notes: dict[str, str] = {}
    with _Bars() as bars:

        def on_event(event: Mapping[str, Any]) -> None:
            if event["event"] == "step":
                notes["loss"] = f"loss {event['loss']:.3f}"
                notes["speed"] = f"{event['images_per_second']:.0f} images/s"
            elif event["event"] == "score":
                notes["score"] = f"held-out {100 * event['top1']:.2f} %"
            bars.note("steps", "  ".join(notes.values()))

        yield bars.update, on_event


def _say_score(event: Mapping[str, Any]) -> None:
    if event["event"] == "score":
        say(f"step {event['step']}: held-out {100 * event['top1']:.2f} %, loss {event['loss']:.3f}")


class _Bars:
    """One bar per kind of work. Workers of the library may report from several threads."""

    def __init__(self, title: str | None = None) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            Progress,
            TaskID,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._bars = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"),
            TextColumn("{task.fields[note]}"), TextColumn("elapsed"), TimeElapsedColumn(),
            TextColumn("about"), TimeRemainingColumn(), TextColumn("left"),
            console=Console(stderr=True), transient=True,
        )  # fmt: skip
        self._title = title
        self._lock = Lock()
        self._tasks: dict[str, TaskID] = {}
        if title:
            self._tasks[""] = self._bars.add_task(title, total=None, count="", note="")

    def __enter__(self) -> "_Bars":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def update(self, what: str, done: int, total: int) -> None:
        """Move the bar of `what`; 0 is an unknown total."""
        with self._lock:
            if what not in self._tasks:
                if "" in self._tasks:
                    self._bars.remove_task(self._tasks.pop(""))
                name = f"{self._title}: {what}" if self._title else what
                self._tasks[what] = self._bars.add_task(name, total=total or None, count="", note="")
            self._bars.update(
                self._tasks[what], completed=done, total=total or None, count=_count(done, total)
            )

    def note(self, what: str, text: str) -> None:
        """Show a text beside the bar of `what`, where there is one."""
        if what in self._tasks:
            self._bars.update(self._tasks[what], note=text)


def _count(done: int, total: int) -> str:
    """Return `3/10`, or a percentage where the numbers are too long to read (bytes)."""
    if not total:
        return str(done) if done else ""
    return f"{done}/{total}" if total < 100_000 else f"{100 * done // total} %"
