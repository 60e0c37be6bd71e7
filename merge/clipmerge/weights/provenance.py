"""What a written file says about how it was made, so that anyone can make it again and compare."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from clipmerge.checkpoint.tensors import Checkpoint
from clipmerge.version import __version__
from clipmerge.weights.expression import Expression, is_sparse
from clipmerge.weights.notation import identifiers_of, notation
from clipmerge.weights.record import FORMAT, needs_quick_gelu, read_record, write_record

GENERATIONS = 2
"""How far back a file tells its history besides its parents: what lies further back stands in those files."""
HEAD_OF = "zero_shot_head"
"""Key of what a zero-shot head that was built for a merge is made of: the base's digest, classes and templates."""
MAX_TRAINING = 1 << 14
"""Characters of a parent's training record that a descendant repeats."""


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

    @classmethod
    def of(cls, name: str, entry: Mapping[str, Any]) -> "Parent":
        """Read an entry of a record; what is not ours in it is left out."""
        file, digest, made = entry.get("file"), entry.get("digest"), entry.get("made")
        return cls(
            name,
            file if isinstance(file, str) else None,
            digest if isinstance(digest, str) else None,
            made if isinstance(made, Mapping) else {},
        )

    def to_json(self) -> dict[str, Any]:
        """Return the entry of a record."""
        known = {"digest": self.digest, "made": self.made}
        return {"file": self.file, **{key: value for key, value in known.items() if value}}


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
    parents = {}
    for checkpoint, name in identifiers_of(weights).items():
        # The file's own name, never its folders; of a published checkpoint what it was asked for by.
        file = checkpoint.extra.get("reference", checkpoint.path and checkpoint.path.name)
        if "set" in checkpoint.extra:
            file = f"{file}#{checkpoint.extra['set']}"
        digest, made = digests and digests[checkpoint], history(read_record(checkpoint.metadata))
        parents[name] = Parent(name, file, digest or None, made).to_json()
    record: dict[str, Any] = {
        "format": FORMAT,
        "version": __version__,
        "notation": notation(weights),
        "total": weights.kind(),
        "dtype": dtype or "base",
        "parents": parents,
    }
    if any("resized" in checkpoint.extra for checkpoint in weights.checkpoints):
        record["resize_positions"] = True  # digests are those of the parents after it
    if all(map(is_sparse, weights.terms)):
        record["sparse"] = True  # zero in every tensor that is not there
    if "model" not in (extra or {}) and (model := weights.model) is not None:
        record["model"] = model
    if prompts := weights.prompts:
        record["prompts"] = prompts
    if any(needs_quick_gelu(checkpoint) for checkpoint in weights.checkpoints):
        record["quick_gelu"] = True
    return write_record({**record, **(extra or {})})


def history(record: Mapping[str, Any], generations: int = GENERATIONS) -> dict[str, Any]:
    """Select what a descendant repeats of a record: how it was made, through at most so many generations."""
    entry = {key: record[key] for key in ("notation", "dtype", "training", HEAD_OF) if key in record}
    if len(json.dumps(entry.get("training"))) > MAX_TRAINING:
        del entry["training"]
    if is_original(record):
        return {"training": entry["training"]} if "training" in entry else {}
    parents = {}
    for parent in parents_of(record):
        made = history(parent.made, generations - 1) if generations > 1 else {}
        parents[parent.name] = replace(parent, made=made).to_json()
    return {**entry, "parents": parents} if parents else entry


def parents_of(record: Mapping[str, Any]) -> tuple[Parent, ...]:
    """Read the parents in a record, sorted by name; entries that are not ours are left out."""
    parents = record.get("parents")
    entries = parents.items() if isinstance(parents, Mapping) else ()
    return tuple(Parent.of(name, entry) for name, entry in sorted(entries) if isinstance(entry, Mapping))


def bases_of(record: Mapping[str, Any]) -> tuple[Parent, ...]:
    """Read the checkpoints that training started from, where the record is of a trained file."""
    training = record.get("training")
    bases = training.get("base") if isinstance(training, Mapping) else None
    entries = bases if isinstance(bases, list) else ()
    return tuple(Parent.of("base", entry) for entry in entries if isinstance(entry, Mapping))


def is_original(record: Mapping[str, Any]) -> bool:
    """Whether the file holds weights as they were in memory (trained, converted), not a merge of files."""
    parents = parents_of(record)
    return len(parents) == 1 and parents[0].file is None and record.get("notation") == parents[0].name
