"""The arguments of pickle's opcodes; every length is checked before anything is allocated."""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from clipmerge.types import Bytes

MAX_LINE = 4096
MAX_NUMBER = 1024


class Malformed(Exception):  # noqa: N818
    """A container is not what it claims to be; `read_torch` turns this into an error that names the file."""


class Unsafe(Exception):  # noqa: N818
    """A pickle asks for a call that is not on the list; the message is the callable's name."""


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """A byte string that was skipped, not read: where it lies in its source."""

    offset: int
    nbytes: int


class Reader:
    """A window `[at, end)` of an open file; `source` is what extents into it will name."""

    def __init__(self, file: BinaryIO, source: Path | Bytes, start: int, end: int) -> None:
        self.file, self.source, self.at, self.end = file, source, start, end
        file.seek(start)

    def byte(self) -> int:
        """The next byte; half of all reads are one byte long."""
        data = self.file.read(1)
        if self.at >= self.end or not data:
            raise Malformed("it is truncated")
        self.at += 1
        return data[0]

    def take(self, nbytes: int) -> bytes:
        """The next bytes."""
        self._advance(nbytes)
        data = self.file.read(nbytes)
        if len(data) != nbytes:
            raise Malformed("it was shortened while it was read")
        return data

    def skip(self, nbytes: int) -> Span:
        """Where the next bytes lie; they are not read."""
        begin = self.at
        self._advance(nbytes)
        self.file.seek(self.at)
        return Span(begin, nbytes)

    def line(self) -> bytes:
        """Up to the next newline, without it."""
        data = self.file.readline(min(MAX_LINE, self.end - self.at))
        if not data.endswith(b"\n"):
            raise Malformed("it has an endless line, or is truncated")
        self.at += len(data)
        return data[:-1]

    def _advance(self, nbytes: int) -> None:
        if not 0 <= nbytes <= self.end - self.at:
            raise Malformed("it is truncated, or a length in it is wrong")
        self.at += nbytes


def nothing(_: Reader) -> None:
    """The argument of an opcode that has none."""


def u1(reader: Reader) -> int:
    return reader.byte()


def u2(reader: Reader) -> int:
    return int.from_bytes(reader.take(2), "little")


def u4(reader: Reader) -> int:
    return int.from_bytes(reader.take(4), "little")


def u8(reader: Reader) -> int:
    return int.from_bytes(reader.take(8), "little")


def i4(reader: Reader) -> int:
    return int.from_bytes(reader.take(4), "little", signed=True)


def f8(reader: Reader) -> float:
    return float(struct.unpack(">d", reader.take(8))[0])


def long1(reader: Reader) -> int:
    return int.from_bytes(reader.take(u1(reader)), "little", signed=True)


def long4(reader: Reader) -> int:
    nbytes = u4(reader)
    if nbytes > MAX_NUMBER:
        raise Malformed(f"it has a number of {nbytes} bytes")
    return int.from_bytes(reader.take(nbytes), "little", signed=True)


def text1(reader: Reader) -> str:
    return reader.take(u1(reader)).decode()


def text4(reader: Reader) -> str:
    return reader.take(u4(reader)).decode()


def text8(reader: Reader) -> str:
    return reader.take(u8(reader)).decode()


def latin1(reader: Reader) -> str:
    """Python 2's strings, and bytes that protocol 2 writes as text."""
    return reader.take(u1(reader)).decode("latin-1")


def latin4(reader: Reader) -> str:
    return reader.take(u4(reader)).decode("latin-1")


def span1(reader: Reader) -> Span:
    return reader.skip(u1(reader))


def span4(reader: Reader) -> Span:
    return reader.skip(u4(reader))


def span8(reader: Reader) -> Span:
    return reader.skip(u8(reader))


def line(reader: Reader) -> str:
    return reader.line().decode()


def two_lines(reader: Reader) -> tuple[str, str]:
    return line(reader), line(reader)


def number_line(reader: Reader) -> int | bool:
    """Protocol 0 writes booleans as 00 and 01, and a long with an L behind it."""
    word = line(reader)
    return word == "01" if word in ("00", "01") else int(word.rstrip("L"))


def float_line(reader: Reader) -> float:
    return float(line(reader))


def quoted_line(reader: Reader) -> str:
    return reader.line().decode("latin-1")[1:-1]


def unicode_line(reader: Reader) -> str:
    return reader.line().decode("raw-unicode-escape")
