"""Where the entries of a zip archive lie, without unpacking it: torch stores tensors uncompressed.

The standard library's reader would do for friendly archives; this one refuses entries that overlap, lie
outside the file, disagree between the two headers, or would inflate to more than the archive could hold.
"""

import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from clipmerge.checkpoint.pickle_reader import Malformed
from clipmerge.checkpoint.tensors import Extent

STORED, DEFLATED = 0, 8
MAX_DIRECTORY = 64 << 20
MAX_INFLATION = 4
"""Weights are close to random bits: a deflated archive that promises more than this ratio is a bomb."""


def looks_like(head: bytes) -> bool:
    return head.startswith(b"PK\x03\x04")


@dataclass(frozen=True, slots=True)
class Entry:
    """One file of the archive; `limit` is where the next entry (or the directory) begins."""

    method: int
    crc: int
    packed: int
    size: int
    header: int
    limit: int


class ZipFile:
    """The directory of an open archive. Names are only keys here: nothing is ever written under them."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file = path, file
        self._size = file.seek(0, 2)
        self._inflated = 0
        self.entries = self._directory()

    def locate(self, name: str) -> Extent:
        """The bytes of an entry: an extent of the file where stored, an array where deflated."""
        entry = self._entry(name)
        if entry.method == STORED:
            return Extent(self._path, self._begin(name, entry), entry.size)
        data = np.frombuffer(self._inflate(name, entry), np.uint8)
        return Extent(data, 0, data.size)

    def read(self, name: str, limit: int) -> bytes:
        """An entry's bytes, at most `limit` of them, checked against the entry's CRC."""
        entry = self._entry(name)
        if entry.size > limit:
            raise Malformed(f"its entry {name!r} has {entry.size} bytes; at most {limit} are read")
        if entry.method == DEFLATED:
            return self._inflate(name, entry)
        data = self._at(self._begin(name, entry), entry.size)
        if zlib.crc32(data) != entry.crc:
            raise Malformed(f"its entry {name!r} does not match its checksum")
        return data

    def _entry(self, name: str) -> Entry:
        if name not in self.entries:
            raise Malformed(f"it has no entry {name!r}")
        return self.entries[name]

    def _begin(self, name: str, entry: Entry) -> int:
        magic, method, name_length, extra = struct.unpack("<4s4xH16xHH", self._at(entry.header, 30))
        if magic != b"PK\x03\x04" or method != entry.method:
            raise Malformed(f"the two headers of its entry {name!r} disagree")
        if self._at(entry.header + 30, name_length) != name.encode():
            raise Malformed(f"the two headers of its entry {name!r} disagree about its name")
        begin = entry.header + 30 + int(name_length) + int(extra)
        if begin + entry.packed > entry.limit:
            raise Malformed(f"its entry {name!r} runs into the next one")
        return begin

    def _inflate(self, name: str, entry: Entry) -> bytes:
        self._inflated += entry.size
        if self._inflated > MAX_INFLATION * self._size + (1 << 20):
            raise Malformed(f"its entry {name!r} would inflate to {entry.size} bytes")
        worker = zlib.decompressobj(-15)
        try:
            data = worker.decompress(self._at(self._begin(name, entry), entry.packed), max(entry.size, 1))
        except zlib.error as error:
            raise Malformed(f"its entry {name!r} does not inflate: {error}") from None
        if len(data) != entry.size or worker.unconsumed_tail or zlib.crc32(data) != entry.crc:
            raise Malformed(f"its entry {name!r} does not match its checksum")
        return data

    def _at(self, offset: int, nbytes: int) -> bytes:
        if offset < 0 or offset + nbytes > self._size:
            raise Malformed("it is truncated")
        self._file.seek(offset)
        return self._file.read(nbytes)

    def _directory(self) -> dict[str, Entry]:
        count, size, start = self._end_record()
        if size > MAX_DIRECTORY or start + size > self._size or count * 46 > size:
            raise Malformed("its directory does not fit into the file")
        raw, at, found = self._at(start, size), 0, []
        for _ in range(count):
            name, entry, at = _central(raw, at)
            found.append((name, entry))
        return _bounded(found, start)

    def _end_record(self) -> tuple[int, int, int]:
        tail = min(self._size, 22 + 65535)
        raw = self._at(self._size - tail, tail)
        at = raw.rfind(b"PK\x05\x06")
        if at < 0 or len(raw) - at < 22:
            raise Malformed("it is a zip archive without its end: truncated")
        count, size, start = struct.unpack_from("<HII", raw, at + 10)
        if count == 0xFFFF or 0xFFFFFFFF in (size, start):
            where = self._size - tail + at - 20
            magic, record = struct.unpack("<4s4xQ4x", self._at(where, 20))
            if magic != b"PK\x06\x07":
                raise Malformed("its zip64 directory is missing")
            magic, count, size, start = struct.unpack("<4s28xQQQ", self._at(record, 56))
            if magic != b"PK\x06\x06":
                raise Malformed("its zip64 directory is missing")
        return count, size, start


def _central(raw: bytes, at: int) -> tuple[str, Entry, int]:
    if len(raw) - at < 46 or raw[at : at + 4] != b"PK\x01\x02":
        raise Malformed("its directory is damaged")
    flags, method, crc, packed, size, names, extras, comment, header = struct.unpack_from(
        "<8xHH4xIIIHHH8xI", raw, at
    )
    name_raw = raw[at + 46 : at + 46 + names]
    extra = raw[at + 46 + names : at + 46 + names + extras]
    size, packed, header = _zip64(extra, [size, packed, header])
    try:
        name = name_raw.decode()
    except UnicodeDecodeError:
        raise Malformed("it has an entry whose name is not Unicode") from None
    if flags & 1 or method not in (STORED, DEFLATED) or (method == STORED and size != packed):
        raise Malformed(f"its entry {name!r} is encrypted or packed in a way that torch never uses")
    return name, Entry(method, crc, packed, size, header, 0), at + 46 + names + extras + comment


def _zip64(extra: bytes, fields: list[int]) -> list[int]:
    """Replace the fields that are all ones by their 64-bit values, which stand in this order in one extra."""
    while len(extra) >= 4 and 0xFFFFFFFF in fields:
        kind, length = struct.unpack_from("<HH", extra)
        body, extra = extra[4 : 4 + length], extra[4 + length :]
        if kind != 1:
            continue
        for i, value in enumerate(fields):
            if value == 0xFFFFFFFF and len(body) >= 8:
                fields[i], body = int.from_bytes(body[:8], "little"), body[8:]
    return fields


def _bounded(found: list[tuple[str, Entry]], end: int) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for name, entry in sorted(found, key=lambda item: item[1].header, reverse=True):
        if name in entries:
            raise Malformed(f"it has two entries {name!r}")
        if entry.header + 30 + len(name.encode()) + entry.packed > end:
            raise Malformed(f"its entry {name!r} overlaps another one")
        entries[name] = Entry(entry.method, entry.crc, entry.packed, entry.size, entry.header, end)
        end = entry.header
    return entries
