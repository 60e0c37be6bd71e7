"""Every score ever paid for, on disk: append-only JSON lines that a killed search resumes from."""

import base64
import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipmerge.errors import SelectionError

Bits = npt.NDArray[np.bool_]


class Journal:
    """Records by key. A line is one `write` to a file opened with O_APPEND, so processes may share a journal.

    A line that is cut off (a process was killed inside the write) is passed over, and the next line starts on
    a line of its own. A later line replaces an earlier one of the same key, unless it knows less.

    Args:
        path: the file; made with its folder on the first `put`.
        fresh: forget what the file holds (it is kept, and appended to).
    """

    def __init__(self, path: str | os.PathLike[str], *, fresh: bool = False) -> None:
        self.path = Path(path)
        self._records: dict[str, dict[str, Any]] = {}
        self._torn = False
        if self.path.is_dir():
            raise SelectionError(f"the journal {self.path} is a folder", hint="name a file, or leave it out")
        for record in self._lines():
            if not fresh:
                self._learn(record)

    def __len__(self) -> int:
        return len(self._records)

    def get(self, key: str) -> Mapping[str, Any] | None:
        """What is known under `key`."""
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
            raise SelectionError(
                f"the journal {self.path} cannot be written: {error.strerror}",
                hint="name another file with --journal, or set CLIPMERGE_CACHE to a folder of yours",
            ) from error
        if self._torn:
            raise SelectionError(f"the journal {self.path} cannot be written: disk full")
        self._learn(entry)

    def _learn(self, entry: dict[str, Any]) -> None:
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
        found = []
        for line in raw.split(b"\n"):
            try:
                record = json.loads(line)
            except ValueError:
                continue
            if isinstance(record, dict) and isinstance(record.get("key"), str):
                found.append(record)
        return found


def pack_bits(bits: Bits) -> str:
    """Booleans as short text: packed, deflated, base 64."""
    return base64.b64encode(zlib.compress(np.packbits(bits).tobytes(), 9)).decode()


def unpack_bits(text: str, count: int) -> Bits:
    """The `count` booleans that `pack_bits` wrote; ValueError where the text holds fewer."""
    try:
        raw = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), count // 8 + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from error
    if len(raw) * 8 < count:
        raise ValueError("too few bits")
    return np.unpackbits(np.frombuffer(raw, np.uint8), count=count).astype(np.bool_)
