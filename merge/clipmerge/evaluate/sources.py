"""Take weights or paths wherever a checkpoint is asked for. Imports no torch."""

import os
from collections.abc import Sequence

from clipmerge.weights.weights import Weights, load, load_all

__all__ = ["Source", "as_weights", "open_all"]

Source = Weights | str | os.PathLike[str]
"""Weights, or the path of a checkpoint (or another name of one that `load` takes)."""


def as_weights(source: Source) -> Weights:
    """Return weights as they are; open a path."""
    return source if isinstance(source, Weights) else load(os.fspath(source))


def open_all(sources: Sequence[Source]) -> list[Weights]:
    """Return weights as they are; open paths, with names that are distinct."""
    opened = iter(load_all([os.fspath(source) for source in sources if not isinstance(source, Weights)]))
    return [source if isinstance(source, Weights) else next(opened) for source in sources]
