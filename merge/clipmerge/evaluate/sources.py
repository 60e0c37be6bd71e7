"""Take weights or paths wherever a checkpoint is asked for. Imports no torch."""

from collections.abc import Sequence
from pathlib import Path

from clipmerge.weights.weights import Weights, load_all

__all__ = ["Source", "open_all"]

Source = Weights | str | Path
"""Weights, or the path of a checkpoint (or another name of one that `load` takes)."""


def open_all(sources: Sequence[Source]) -> list[Weights]:
    """Return weights as they are; open paths, with names that are distinct."""
    opened = iter(load_all([str(source) for source in sources if not isinstance(source, Weights)]))
    return [source if isinstance(source, Weights) else next(opened) for source in sources]
