"""Read a pickle without running anything: Python's own unpickler, in which every name stays a name.

`find_class` imports nothing and gives a `Global`; an instance is a `Stub` that keeps the state it was given; byte
strings are skipped, not read. What a pickle may call is decided by the caller's table (`torch_calls`). It is the pure
Python unpickler because its memo is a dict and its steps can be replaced one by one: the C one would allocate a table
as large as the largest number in a hostile file, and hash whatever a hostile file uses as a key.
"""

import pickle
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

from clipmerge.checkpoint.tensors import Extent
from clipmerge.types import Bytes

MAX_READS = 4_000_000
"""Opcodes and arguments. A ViT-L/14 with its AdamW has 59 000 opcodes in a training checkpoint, 98 000 as a module."""
MAX_LINE = 4096
MAX_KEY = 2**60


class Malformed(Exception):  # noqa: N818
    """A container is not what it claims to be; `read_torch` turns this into an error that names the file."""


class Unsafe(Exception):  # noqa: N818
    """A pickle asks for a call that is not on the list; the message is the callable's name."""


class Budget:
    """How many steps the pickles of one file may take, and how many characters and items their calls may copy.

    Without the first a short pickle could name another a million times, without the second copy one long list for ever.
    """

    def __init__(self, copies: int) -> None:
        self.steps, self.copies = MAX_READS, copies

    def charge(self, args: tuple[Any, ...]) -> None:
        """Count what a call may copy."""
        self.copies -= sum(len(arg) for arg in args if isinstance(arg, str | list | tuple | dict))
        if self.copies < 0:
            raise Malformed("its pickle copies more than the file holds")


class Window:
    """The bytes [at, end) of an open file, as an unpickler reads them: no length is believed before it is checked.

    `source` is what extents into it will name. Windows into one file share `budget`.
    """

    def __init__(self, file: BinaryIO, source: Path | Bytes, start: int, end: int, budget: Budget) -> None:
        self.file, self.source, self.at, self.end, self.budget = file, source, start, end, budget
        file.seek(start)

    def read(self, nbytes: int) -> bytes:
        """Read the next bytes, all of them."""
        self.budget.steps -= 1
        if self.budget.steps < 0:
            raise Malformed(f"its pickle has more than {MAX_READS} steps")
        self._check(nbytes)
        data = self.file.read(nbytes)
        if len(data) != nbytes:
            raise Malformed("it was shortened while it was read")
        self.at += nbytes
        return data

    def readline(self) -> bytes:
        """Read up to the next newline and with it."""
        data = self.file.readline(min(MAX_LINE, self.end - self.at))
        if not data.endswith(b"\n"):
            raise Malformed("it has an endless line, or is truncated")
        self.at += len(data)
        return data

    def skip(self, nbytes: int) -> Extent:
        """Skip the next bytes. Returns where they lie."""
        self._check(nbytes)
        skipped = Extent(self.source, self.at, nbytes)
        self.at += nbytes
        self.file.seek(self.at)
        return skipped

    def _check(self, nbytes: int) -> None:
        if not 0 <= nbytes <= self.end - self.at:
            raise Malformed("it is truncated, or a length in it is wrong")


@dataclass(slots=True, eq=False)
class Global:
    """The name of a class or function, not the thing. Calling it does what the table says about that name."""

    path: str
    call: "Callable[[Global, tuple[Any, ...]], Any]"

    def __call__(self, *args: Any) -> Any:
        return self.call(self, args)


@dataclass(slots=True, eq=False)
class Stub:
    """An instance of a class that was not imported: its arguments, and the state it was given. Items are dropped."""

    path: str
    args: Any = ()
    state: Any = None

    def __call__(self, *_: Any) -> Any:
        raise Unsafe(self.path)

    def __setitem__(self, key: Any, value: Any) -> None: ...

    def append(self, value: Any) -> None: ...

    def extend(self, values: Any) -> None: ...


class SafeDict(dict[Any, Any]):
    """A dict that refuses keys whose hash a hostile file could make take for ever: nested tuples, giant numbers."""

    def __setitem__(self, key: Any, value: Any) -> None:
        parts = key if isinstance(key, tuple) and len(key) < 64 else (key,)
        for part in parts:
            if isinstance(part, int) and abs(part) >= MAX_KEY:
                raise Malformed("its pickle uses a giant number as a key")
            if not isinstance(part, int | str | float | Global | Stub | Extent | None):
                raise Malformed(f"its pickle uses a {type(part).__name__} as a key")
        super().__setitem__(key, value)


def dict_of(pairs: Any) -> SafeDict:
    """Make a dict of (key, value) pairs."""
    safe = SafeDict()
    for key, value in pairs:
        safe[key] = value
    return safe


def new(cls: Any, args: Any = ()) -> Stub:
    """Make an inert instance; as in pickle itself, no constructor runs."""
    if not isinstance(cls, Global):
        raise Malformed("its pickle makes an instance of what is not a class")
    return Stub(cls.path, args)


class Unpickler(pickle._Unpickler):
    """Python's unpickler with the steps replaced that import, construct, hash or allocate.

    Args:
        window: what to read; it stands behind the pickle's end afterwards.
        call: does a call of a `Global`.
        persistent: gives what a persistent id stands for.
    """

    append: Callable[[Any], None]
    stack: list[Any]
    proto: int = 0
    pop_mark: Callable[[], list[Any]]

    def __init__(
        self,
        window: Window,
        call: Callable[[Global, tuple[Any, ...]], Any],
        persistent: Callable[[Any], Any],
    ) -> None:
        super().__init__(window, encoding="latin-1")
        self._window, self._call, self._persistent = window, call, persistent

    def load(self) -> Any:
        """Read one pickle: the base class's loop without its buffer of frames, which a file's size does not bound."""
        self.read, self.readline = self._window.read, self._window.readline
        self.metastack: list[list[Any]] = []
        self.stack = []
        self.append = self.stack.append
        read, dispatch = self.read, self.dispatch
        try:
            while True:
                dispatch[read(1)[0]](self)
        except pickle._Stop as stop:  # type: ignore[attr-defined]
            return stop.value

    def persistent_load(self, pid: Any) -> Any:
        return self._persistent(pid)

    def find_class(self, module: str, name: str) -> Any:
        if self.proto < 3:  # written under Python 2's names: `commands.Popen` is `subprocess.Popen`
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        return Global(f"{module}.{name}"[:MAX_LINE], self._called)

    def _called(self, function: Global, args: tuple[Any, ...]) -> Any:
        self._window.budget.charge(args)
        return self._call(function, args)

    def _skip(self, width: int) -> None:
        self.append(self._window.skip(int.from_bytes(self._window.read(width), "little")))

    def _dict(self) -> None:
        items = self.pop_mark()
        self.append(dict_of(zip(items[::2], items[1::2], strict=True)))

    def _reduce(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        if not isinstance(args, tuple):
            raise Malformed("its pickle calls something without arguments")
        if not isinstance(function, Global | Stub):
            raise Unsafe(type(function).__name__)
        self.append(function(*args))

    def _new(self) -> None:
        args, cls = self.stack.pop(), self.stack.pop()
        self.append(new(cls, args))

    def _new_with_keywords(self) -> None:
        keywords, args, cls = self.stack.pop(), self.stack.pop(), self.stack.pop()
        self.append(new(cls, (args, keywords)))

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Stub):
            target.state = state
        elif isinstance(target, Global):
            raise Unsafe(target.path)

    _base = pickle._Unpickler.dispatch
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **_base,
        pickle.FRAME[0]: lambda self: self._window.read(8),  # frames only say how to read ahead
        pickle.SHORT_BINBYTES[0]: lambda self: self._skip(1),
        pickle.BINBYTES[0]: lambda self: self._skip(4),
        pickle.BINBYTES8[0]: lambda self: self._skip(8),
        pickle.BYTEARRAY8[0]: lambda self: self._skip(8),
        pickle.EMPTY_DICT[0]: lambda self: self.append(SafeDict()),
        pickle.DICT[0]: _dict,
        pickle.EMPTY_SET[0]: _base[pickle.EMPTY_LIST[0]],  # sets are lists here: nothing is hashed
        pickle.ADDITEMS[0]: _base[pickle.APPENDS[0]],
        pickle.FROZENSET[0]: _base[pickle.LIST[0]],
        pickle.REDUCE[0]: _reduce,
        pickle.NEWOBJ[0]: _new,
        pickle.NEWOBJ_EX[0]: _new_with_keywords,
        pickle.BUILD[0]: _build,
    }
