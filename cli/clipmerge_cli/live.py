"""Training as it goes: one line on stderr with loss, held-out accuracy, images a second and time left."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from clipmerge_cli.show import say

OnProgress = Callable[[str, int, int], None]
OnEvent = Callable[[Mapping[str, Any]], None]


@contextmanager
def live(*, quiet: bool = False) -> Iterator[tuple[OnProgress | None, OnEvent | None]]:
    """Callbacks for `finetune`: a live line at a terminal, scores as plain lines elsewhere, nothing if quiet."""
    if quiet:
        yield None, None
        return
    if not sys.stderr.isatty():
        yield None, _plain
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    bars = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[said]}"), TextColumn("left"), TimeRemainingColumn(),
        console=Console(stderr=True), transient=True,
    )  # fmt: skip
    tasks: dict[str, TaskID] = {}
    said: dict[str, str] = {}

    def on_progress(what: str, done: int, total: int) -> None:
        if what not in tasks:
            tasks[what] = bars.add_task(what, total=total, said="")
        bars.update(tasks[what], completed=done, total=total)

    def on_event(event: Mapping[str, Any]) -> None:
        said.update(_words(event))
        if "steps" in tasks:
            bars.update(tasks["steps"], said="  ".join(said.values()))

    with bars:
        yield on_progress, on_event


def _words(event: Mapping[str, Any]) -> dict[str, str]:
    if event["event"] == "step":
        return {"loss": f"loss {event['loss']:.3f}", "speed": f"{event['images_per_second']:.0f} images/s"}
    if event["event"] == "score":
        return {"score": f"held-out {100 * event['top1']:.2f} %"}
    return {}


def _plain(event: Mapping[str, Any]) -> None:
    if event["event"] == "score":
        say(f"step {event['step']}: held-out {100 * event['top1']:.2f} %, loss {event['loss']:.3f}")
