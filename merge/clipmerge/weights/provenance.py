"""What a written file says about how it was made, so that anyone can make it again and compare."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from clipmerge.checkpoint.tensors import Checkpoint
from clipmerge.version import __version__
from clipmerge.weights.expression import Expression
from clipmerge.weights.notation import identifiers_of, notation
from clipmerge.weights.record import FORMAT, needs_quick_gelu, read_record, write_record

GENERATIONS = 8
"""How far back a file tells its history: shared ancestors are told once for each path to them."""
MAX_TRAINING = 1 << 14
"""Characters of a parent's training record that a descendant repeats."""


def file_metadata(
    weights: Expression,
    *,
    dtype: str | None = None,
    extra: Mapping[str, Any] | None = None,
    digests: Mapping[Checkpoint, str] | None = None,
) -> dict[str, str]:
    """Describe in metadata how the file that `weights` becomes was made.

    Args:
        extra: further keys of the record ("model", "training", "selection" …); they win over inherited ones.
        digests: each parent's content digest; without them the file cannot be verified.
    """
    names = identifiers_of(weights)
    parents = {}
    for checkpoint, name in names.items():
        parent: dict[str, Any] = {"file": _file_name(checkpoint)}
        if digests is not None:
            parent["digest"] = digests[checkpoint]
        if made := history(read_record(checkpoint.metadata)):
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
    if (model := weights.model) is not None:
        record["model"] = model
    if any(needs_quick_gelu(checkpoint) for checkpoint in names):
        record["quick_gelu"] = True
    return write_record({**record, **(extra or {})})


def _file_name(checkpoint: Checkpoint) -> str | None:
    """The file's own name, never its folders; of a published checkpoint what it was asked for by."""
    reference = checkpoint.extra.get("reference")
    if isinstance(reference, str):
        return reference
    return checkpoint.path.name if checkpoint.path else None


def history(record: Mapping[str, Any], generations: int = GENERATIONS) -> dict[str, Any]:
    """Select what a descendant repeats of a record: how it was made, through at most so many generations."""
    entry = {key: record[key] for key in ("notation", "dtype", "training") if key in record}
    if len(json.dumps(entry.get("training"))) > MAX_TRAINING:
        del entry["training"]
    if is_original(record):
        return {"training": entry["training"]} if "training" in entry else {}
    parents = {}
    for parent in parents_of(record):
        repeated: dict[str, Any] = {"file": parent.file}
        if parent.digest is not None:
            repeated["digest"] = parent.digest
        if parent.made and generations > 1 and (made := history(parent.made, generations - 1)):
            repeated["made"] = made
        parents[parent.name] = repeated
    return {**entry, "parents": parents} if parents else entry


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
    """Read the parents in a record, sorted by name; entries that are not ours are left out."""
    parents = record.get("parents")
    entries = parents.items() if isinstance(parents, Mapping) else ()
    return tuple(_parent(name, entry) for name, entry in sorted(entries) if isinstance(entry, Mapping))


def bases_of(record: Mapping[str, Any]) -> tuple[Parent, ...]:
    """Read the checkpoints that training started from, where the record is of a trained file."""
    training = record.get("training")
    bases = training.get("base") if isinstance(training, Mapping) else None
    entries = bases if isinstance(bases, list) else ()
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
