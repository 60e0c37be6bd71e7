"""Draw results: one literal table from a result's kind to the function that draws it."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from clipmerge.errors import SelectionError
from clipmerge.report import comparison, history, sweeps
from clipmerge.report.style import targets

__all__ = ["Result", "plot", "training"]

Document = Mapping[str, Any]

_DRAW: Mapping[str, Callable[[Document, str | Path], None]] = {
    "sweep": sweeps.sweep,
    "patch": sweeps.patch,
    "greedy_soup": history.soup,
    "greedy_ensemble": history.soup,
    "learned_soup": history.coefficients,
    "coefficients": history.search,
    "comparison": comparison.comparison,
}


class Result(Protocol):
    """What a search returns."""

    def to_json(self) -> dict[str, Any]: ...


def plot(result: Result | Document, path: str | Path) -> list[Path]:
    """Draw any result of a search. Returns the files written.

    Args:
        result: it, or the document of its `to_json()`, as `--json` prints it.
        path: the figure; PNG and SVG are both written, whichever suffix it has.

    Raises:
        SelectionError: there is no figure of this kind of result.
    """
    document = result if isinstance(result, Mapping) else result.to_json()
    kind = str(document.get("kind"))
    if kind not in _DRAW:
        raise SelectionError(
            f"results of kind {kind!r} cannot be plotted", hint=f"these can: {', '.join(_DRAW)}"
        )
    _DRAW[kind](document, path)
    return targets(path)


def training(events: Sequence[Document], path: str | Path) -> list[Path]:
    """Draw a finetuning's log: loss, learning rate and held-out scores against steps. Returns the files written."""
    history.training(events, path)
    return targets(path)
