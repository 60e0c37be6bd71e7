"""A ready-made `on_progress`, for scripts and notebooks."""

from typing import Any

_bars: dict[str, Any] = {}


def progress_bar(what: str, done: int, total: int) -> None:
    """Show long work as bars, of a notebook or of a terminal: `greedy_soup(…, on_progress=progress_bar)`."""
    from tqdm.auto import tqdm

    bar = _bars.get(what)
    if bar is None or bar.total != (total or None):
        if bar is not None:
            bar.close()
        bar = _bars[what] = tqdm(desc=what, total=total or None)
    bar.update(done - bar.n)
    if total and done >= total:
        _bars.pop(what).close()
