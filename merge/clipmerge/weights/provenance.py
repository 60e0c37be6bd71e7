"""What a written file says about how it was made, so that anyone can make it again and compare."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clipmerge.checkpoint.tensors import Checkpoint
from clipmerge.types import Progress
from clipmerge.version import __version__
from clipmerge.weights.digest import content_digest
from clipmerge.weights.notation import identifiers_of, notation
from clipmerge.weights.record import FORMAT, needs_quick_gelu, read_record, write_record
from clipmerge.weights.weights import Weights

GENERATIONS = 8
"""How far back a file tells its history: shared ancestors are told once for each path to them."""
MAX_TRAINING = 1 << 14
"""Characters of a parent's training record that a descendant repeats."""


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
        parent: dict[str, Any] = {"file": _file_name(checkpoint)}
        if digests:
            parent["digest"] = content_digest(checkpoint, on_progress)
        made = history(read_record(checkpoint.metadata))
        if made:
            parent["made"] = made
        parents[name] = parent
    record: dict[str, Any] = {
        "format": FORMAT,
        "version": __version__,
        "notation": notation(weights),
        "total": weights.kind(),
        "dtype": dtype or "base",
        "parents": parents,
    }
    model = weights.model
    if model is not None:
        record["model"] = model
    if any(needs_quick_gelu(checkpoint) for checkpoint in names):
        record["quick_gelu"] = True
    record.update(extra or {})
    return write_record(record)


def _file_name(checkpoint: Checkpoint) -> str | None:
    """The file's own name, never its folders; of a published checkpoint what it was asked for by."""
    reference = checkpoint.extra.get("reference")
    if isinstance(reference, str):
        return reference
    return checkpoint.path.name if checkpoint.path else None


def history(record: Mapping[str, Any], generations: int = GENERATIONS) -> dict[str, Any]:
    """What a descendant keeps of a record: how it was made, through at most so many generations."""
    kept = {key: record[key] for key in ("notation", "dtype", "training") if key in record}
    if len(json.dumps(kept.get("training"))) > MAX_TRAINING:
        del kept["training"]
    if is_original(record):
        return {"training": kept["training"]} if "training" in kept else {}
    parents = {}
    for parent in parents_of(record):
        entry: dict[str, Any] = {"file": parent.file}
        if parent.digest is not None:
            entry["digest"] = parent.digest
        if parent.made and generations > 1 and (made := history(parent.made, generations - 1)):
            entry["made"] = made
        parents[parent.name] = entry
    return {**kept, "parents": parents} if parents else kept


@dataclass(frozen=True, slots=True)
class Parent:
    """One parent as a record names it.

    Attributes:
        name: what the notation calls it.
        file: its file's name, None for tensors that were in memory.
        digest: its content digest, None where none was taken.
        made: its own record, {} where it had none.
    """

    name: str
    file: str | None
    digest: str | None
    made: Mapping[str, Any]


def parents_of(record: Mapping[str, Any]) -> tuple[Parent, ...]:
    """The parents in a record, sorted by name; entries that are not ours are left out."""
    found = record.get("parents")
    entries = found.items() if isinstance(found, Mapping) else ()
    return tuple(_parent(name, entry) for name, entry in sorted(entries) if isinstance(entry, Mapping))


def bases_of(record: Mapping[str, Any]) -> tuple[Parent, ...]:
    """The checkpoints that training started from, where the record is of a trained file."""
    training = record.get("training")
    found = training.get("base") if isinstance(training, Mapping) else None
    entries = found if isinstance(found, list) else ()
    return tuple(_parent("base", entry) for entry in entries if isinstance(entry, Mapping))


def _parent(name: str, entry: Mapping[str, Any]) -> Parent:
    file, digest, made = entry.get("file"), entry.get("digest"), entry.get("made")
    return Parent(
        name,
        file if isinstance(file, str) else None,
        digest if isinstance(digest, str) else None,
        made if isinstance(made, Mapping) else {},
    )


def is_original(record: Mapping[str, Any]) -> bool:
    """Whether the file holds weights as they were in memory (trained, converted), not a merge of files."""
    parents = parents_of(record)
    return len(parents) == 1 and parents[0].file is None and record.get("notation") == parents[0].name
