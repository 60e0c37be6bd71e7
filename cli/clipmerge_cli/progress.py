"""The library's `on_progress(what, done, total)` as Rich bars on stderr; silent where nobody watches."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Lock

OnProgress = Callable[[str, int, int], None]


@contextmanager
def progress(*, quiet: bool = False, title: str | None = None) -> Iterator[OnProgress | None]:
    """A callback for long work while the block runs, or None where stderr is no terminal or `quiet`.

    Each distinct `what` is one bar, with `title` before it; bars vanish when the block ends, so that the result
    stands alone.
    """
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    bars = Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(),
        console=Console(stderr=True), transient=True,
    )  # fmt: skip
    tasks: dict[str, TaskID] = {}
    lock = Lock()

    def update(what: str, done: int, total: int) -> None:
        with lock:
            if what not in tasks:
                if "" in tasks:
                    bars.remove_task(tasks.pop(""))
                tasks[what] = bars.add_task(
                    f"{title}: {what}" if title else what, total=total or None, count=""
                )
            bars.update(tasks[what], completed=done, total=total or None, count=_count(done, total))

    with bars:
        if title:
            tasks[""] = bars.add_task(title, total=None, count="")
        yield update


def _count(done: int, total: int) -> str:
    """`3/10`, or a percentage where the numbers are too long to read (bytes)."""
    if not total:
        return str(done) if done else ""
    return f"{done}/{total}" if total < 100_000 else f"{100 * done // total} %"
