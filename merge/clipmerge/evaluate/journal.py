"""Remember every result on disk, in append-only JSON lines that a killed search resumes from."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from clipmerge.checkpoint.tensors import Checkpoint
from clipmerge.errors import SelectionError
from clipmerge.weights.expression import Expression

__all__ = ["Journal", "recipe_digest"]


class Journal:
    """Records by key. A line is one `write` to a file opened with O_APPEND, so processes may share a journal.

    A line that is cut off (a process was killed inside the write) is passed over, and the next line starts on
    a line of its own. A later line replaces an earlier one of the same key, unless it knows less.

    Args:
        path: the file; made with its folder on the first `put`.
        fresh: ignore what the file holds (it is kept, and appended to).
        on_resume: called when the first record that the file held is asked for.

    Raises:
        SelectionError: the file is not a journal, or cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        fresh: bool = False,
        on_resume: Callable[[], object] | None = None,
    ) -> None:
        self.path = Path(path)
        self._on_resume = on_resume
        self._records: dict[str, dict[str, Any]] = {}
        self._torn = False
        if self.path.is_dir():
            raise SelectionError(f"the journal {self.path} is a folder", hint="name a file, or leave it out")
        for record in self._lines():
            if not fresh:
                self._note(record)
        self._held = frozenset(self._records)
        places = (self.path, *self.path.absolute().parents)
        if not os.access(next(place for place in places if place.exists()), os.W_OK):
            raise self._unwritable("no permission")

    def __len__(self) -> int:
        return len(self._records)

    def get(self, key: str) -> Mapping[str, Any] | None:
        """Return the record of `key`, None where there is none."""
        if self._on_resume is not None and key in self._held:
            self._on_resume()
            self._on_resume = None
        return self._records.get(key)

    def put(self, key: str, record: Mapping[str, Any]) -> None:
        """Append one record; it is on its way to disk when this returns.

        Raises:
            SelectionError: the journal cannot be written.
        """
        entry = {"key": key, **record}
        line = json.dumps(entry, separators=(",", ":"), sort_keys=True) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                data = (("\n" if self._torn else "") + line).encode()
                self._torn = os.write(handle, data) < len(data)
            finally:
                os.close(handle)
        except OSError as error:
            raise self._unwritable(str(error.strerror)) from error
        if self._torn:
            raise self._unwritable("disk full")
        self._note(entry)

    def _unwritable(self, why: str) -> SelectionError:
        hint = "name another file with --journal, or set CLIPMERGE_CACHE to a folder of yours"
        return SelectionError(f"the journal {self.path} cannot be written: {why}", hint=hint)

    def _note(self, entry: dict[str, Any]) -> None:
        known = self._records.get(entry["key"])
        if known is None or "correct" in entry or "correct" not in known:
            self._records[entry["key"]] = entry

    def _lines(self) -> list[dict[str, Any]]:
        try:
            raw = self.path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise SelectionError(f"the journal {self.path} cannot be read: {error.strerror}") from error
        self._torn = bool(raw) and not raw.endswith(b"\n")
        records, foreign = [], False
        for line in filter(None, raw.split(b"\n")):
            try:
                record = json.loads(line)
            except ValueError:
                foreign |= not line.startswith(b'{"')  # else it is a record that was cut off
                continue
            if isinstance(record, dict) and isinstance(record.get("key"), str):
                records.append(record)
            else:
                foreign = True
        if foreign and not records:
            hint = "name a new file, or one that a search has written"
            raise SelectionError(f"{self.path} is not a journal, and nothing else is appended to", hint=hint)
        return records


def recipe_digest(weights: Expression, digest: Callable[[Checkpoint], str]) -> str:
    """Digest what weights are made of: checkpoints' digests and exact coefficients, however the sum was written."""
    return hashlib.sha256(json.dumps(_recipe(weights, digest)).encode()).hexdigest()[:32]


def _recipe(weights: Expression, digest: Callable[[Checkpoint], str]) -> list[list[Any]]:
    terms: list[list[Any]] = []
    for leaf, coefficient in weights.terms.items():
        if isinstance(leaf, Checkpoint):
            terms.append([str(coefficient), digest(leaf)])
        else:
            operands = [_recipe(operand, digest) for operand in leaf.operands]
            options = json.dumps(dict(leaf.options), sort_keys=True)
            merged = [] if leaf.merged is None else [_recipe(leaf.merged, digest)]
            files = [[digest(file) for file in leaf.statistics]] * bool(leaf.statistics)
            terms.append([str(coefficient), leaf.method.name, options, operands, *merged, *files])
    return sorted(terms, key=json.dumps)
