"""`verify` as users call it: what a model built for a merge is built again."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clipmerge.types import Progress
from clipmerge.weights import verify as records
from clipmerge.weights.weights import Weights

__all__ = ["verify"]


def verify(
    checkpoint: str | Path | Weights,
    parents: str | Path | Sequence[str | Path] = (),
    *,
    device: str | None = None,
    on_progress: Progress | None = None,
) -> records.Verdict:
    """Recompute a merged file from its parents and compare every tensor, bit for bit.

    A zero-shot head that was built for the merge (WiSE-FT over a trained head) is built again from its base.

    Args:
        checkpoint, parents, device: as in `weights.verify.verify`.

    Raises:
        CheckpointError: the file cannot be read, or its record makes no sense.
    """
    return records.verify(checkpoint, parents, rebuild=_rebuild, device=device, on_progress=on_progress)


def _rebuild(recipe: Mapping[str, Any], base: Weights) -> Weights:
    from clipmerge.evaluate.zero_shot import rebuild_head  # torch, which most files do not need

    return rebuild_head(recipe, base)
