"""Where the entries of a zip archive lie, without unpacking it: torch stores tensors uncompressed.

Python's zipfile reads the directory. Before a byte is taken from an entry, it is made sure that no two entries share
bytes, that both headers of an entry agree, and that nothing inflates to more than the archive could hold.
"""

import io
import struct
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from clipmerge.checkpoint.tensors import Extent
from clipmerge.checkpoint.unpickler import Malformed

MAX_INFLATION = 4
"""Weights are close to random bits: a deflated archive that promises more than this ratio is a bomb."""
_FAULTS = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, ValueError, NotImplementedError)


def looks_like(head: bytes) -> bool:
    """Return whether a file's first bytes are a zip archive's."""
    return head.startswith(b"PK\x03\x04")


class Part(io.RawIOBase):
    """The bytes [start, start + length) of an open file, as a file of its own."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        self._file, self._start, self._at = file, start, 0
        self._length = max(0, min(length, file.seek(0, 2) - start))

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, self._length)[whence]
        return self._at

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._length - self._at)
        self._file.seek(self._start + self._at)
        data = self._file.read(left if size is None or size < 0 else min(size, left))
        self._at += len(data)
        return data


class Archive:
    """The directory of an open archive. Names are only keys here: nothing is ever written under them.

    Args:
        start: where in the file at `path` the archive begins, `file` being that part of it.
    """

    def __init__(self, path: Path, file: "BinaryIO | Part", start: int = 0) -> None:
        self._path, self._file, self._inflated, self._start = path, file, 0, start
        self._size = file.seek(0, 2)
        try:
            self._zip = zipfile.ZipFile(file)
        except _FAULTS as error:
            raise Malformed(f"its zip directory cannot be read: {error}") from None
        self.entries: dict[str, zipfile.ZipInfo] = {}
        self._limits: dict[str, int] = {}
        end = self._zip.start_dir
        for entry in sorted(self._zip.infolist(), key=lambda entry: -entry.header_offset):
            name = entry.filename
            if name in self.entries:
                raise Malformed(f"it has two entries {name!r}")
            if entry.header_offset < 0 or entry.header_offset + 30 + len(name) + entry.compress_size > end:
                raise Malformed(f"its entry {name!r} overlaps another one")
            if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise Malformed(f"its entry {name!r} is encrypted or packed in a way that torch never uses")
            self.entries[name], self._limits[name] = entry, end
            end = entry.header_offset

    def locate(self, name: str) -> Extent:
        """Return the bytes of an entry: an extent of the file where stored, an array where deflated."""
        entry = self._entry(name)
        if entry.compress_type == zipfile.ZIP_DEFLATED:
            data = np.frombuffer(self.read(name, entry.file_size), np.uint8)
            return Extent(data, 0, data.size)
        with self._opened(name):  # compares the two headers
            self._file.seek(entry.header_offset + 26)
            lengths = struct.unpack("<HH", self._file.read(4))
        begin = entry.header_offset + 30 + sum(lengths)
        if entry.file_size != entry.compress_size or begin + entry.file_size > self._limits[name]:
            raise Malformed(f"its entry {name!r} runs into the next one")
        return Extent(self._path, self._start + begin, entry.file_size)

    def read(self, name: str, limit: int) -> bytes:
        """Return an entry's bytes, at most `limit` of them, checked against the entry's CRC."""
        entry = self._entry(name)
        if entry.file_size > limit:
            raise Malformed(f"its entry {name!r} has {entry.file_size} bytes; at most {limit} are read")
        self._inflated += entry.file_size
        if self._inflated > MAX_INFLATION * self._size + (1 << 20):
            raise Malformed(f"its entry {name!r} would inflate to {entry.file_size} bytes")
        with self._opened(name) as opened:
            try:
                data = opened.read(entry.file_size + 1)
            except _FAULTS as error:
                raise Malformed(f"its entry {name!r} does not match its checksum: {error}") from None
        if len(data) != entry.file_size:
            raise Malformed(f"its entry {name!r} does not match its checksum")
        return data

    def _entry(self, name: str) -> zipfile.ZipInfo:
        if name not in self.entries:
            raise Malformed(f"it has no entry {name!r}")
        return self.entries[name]

    def _opened(self, name: str) -> zipfile.ZipExtFile:
        try:
            return self._zip.open(self.entries[name])  # type: ignore[return-value]
        except _FAULTS as error:
            raise Malformed(f"the two headers of its entry {name!r} disagree: {error}") from None
