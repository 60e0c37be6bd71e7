"""What a written file says about how it was made, so that anyone can make it again and compare."""

from collections.abc import Mapping
from typing import Any

import clipmerge
from clipmerge.checkpoint.tensors import Checkpoint
from clipmerge.weights.digest import content_digest
from clipmerge.weights.expression import Progress, Weights
from clipmerge.weights.notation import identifiers_of, notation
from clipmerge.weights.record import FORMAT, read_record, write_record


def file_metadata(
    weights: Weights,
    *,
    dtype: str | None = None,
    extra: Mapping[str, Any] | None = None,
    digests: bool = True,
    on_progress: Progress | None = None,
) -> dict[str, str]:
    """The metadata of the file that `weights` becomes.

    Args:
        extra: further keys of the record ("model", "training", "selection" …); they win over inherited ones.
        digests: whether each parent's content digest is taken; without them the file cannot be verified.
    """
    names = identifiers_of(weights)
    parents = {}
    for checkpoint, name in names.items():
        parent: dict[str, Any] = {"file": checkpoint.path.name if checkpoint.path else None}
        if digests:
            parent["digest"] = content_digest(checkpoint, on_progress)
        history = {
            k: v
            for k, v in read_record(checkpoint.metadata).items()
            if k in ("notation", "parents", "training")
        }
        if history:
            parent["made"] = history
        parents[name] = parent
    record: dict[str, Any] = {
        "format": FORMAT,
        "version": clipmerge.__version__,
        "notation": notation(weights),
        "total": weights.kind(),
        "dtype": dtype or "base",
        "parents": parents,
    }
    model = weights.model
    if model is not None:
        record["model"] = model
    record.update(extra or {})
    return write_record(record)


def is_recorded(checkpoint: Checkpoint) -> bool:
    """Whether clipmerge wrote the file."""
    return bool(read_record(checkpoint.metadata))
