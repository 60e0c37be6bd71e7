"""A pickle machine that cannot run code: globals stay names, instances stay their state.

It keeps pickle's stack and memo and nothing else. A global is a `Global`, a name that is never imported;
making an instance gives a `Stub` that remembers its class's name and the state it was given. What a REDUCE
may call is decided by the caller's table (`torch_calls`), which knows names only. Steps are counted: a pickle
that would take more than `MAX_STEPS` is refused.
"""

from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from clipmerge.checkpoint import pickle_reader as r
from clipmerge.checkpoint.pickle_reader import Malformed, Reader, Span, Unsafe

MAX_STEPS = 1_000_000
"""Opcodes. A ViT-L/14 with its AdamW takes 59 000 in a training checkpoint, 98 000 as a module."""
MAX_KEY = 2**60
_STOP = ord(".")


@dataclass(frozen=True, slots=True)
class Global:
    """The name of a class or function, not the thing."""

    path: str


@dataclass(slots=True, eq=False)
class Stub:
    """An instance of a class that was not imported: its arguments, the state and items it was given."""

    cls: str
    args: Any = ()
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Budget:
    """What the pickles of one file may still cost: steps, and characters of text that calls copy."""

    text: int
    steps: int = MAX_STEPS

    def charge(self, args: tuple[Any, ...]) -> None:
        """Count what a call may copy: without this, a short pickle could copy one long list for ever."""
        for arg in args:
            if isinstance(arg, str):
                self.text -= len(arg)
            elif isinstance(arg, list | tuple | dict | set):
                self.steps -= len(arg)
        if self.text < 0 or self.steps < 0:
            raise Malformed("its pickle copies more than the file holds")


Call = Callable[[Global, tuple[Any, ...]], Any]


class Machine:
    """One pickle's stack and memo."""

    def __init__(self, reader: Reader, call: Call, persistent: Callable[[Any], Any], budget: Budget) -> None:
        self._reader, self._call, self._persistent, self._budget = reader, call, persistent, budget
        self._stack: list[Any] = []
        self._marks: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._protocol = 0

    def run(self) -> Any:
        """The object that the next pickle describes; the reader stands behind its STOP."""
        reader, budget, next_byte = self._reader, self._budget, self._reader.byte
        while True:
            budget.steps -= 1
            if budget.steps < 0:
                raise Malformed(f"its pickle has more than {MAX_STEPS} steps")
            code = next_byte()
            if code == _STOP:
                return self._stack.pop()
            row = _OPCODES.get(code)
            if row is None:
                raise Malformed(f"it has the pickle opcode {code:#04x}, which no checkpoint needs")
            row[1](self, row[0](reader))

    def push(self, value: Any) -> None:
        self._stack.append(value)

    def since_mark(self) -> list[Any]:
        items, self._stack = self._stack, self._marks.pop()
        return items

    def mark(self, _: None) -> None:
        self._marks.append(self._stack)
        self._stack = []

    def pop(self, _: None) -> None:
        if self._stack:
            self._stack.pop()
        else:
            self.since_mark()

    def pop_mark(self, _: None) -> None:
        self.since_mark()

    def dup(self, _: None) -> None:
        self.push(self._stack[-1])

    def put(self, index: int) -> None:
        self._memo[index] = self._stack[-1]

    def memoize(self, _: None) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def get(self, index: int) -> None:
        self.push(self._memo[index])

    def tuple_of(self, count: int) -> None:
        items = tuple(self._stack[-count:])
        if len(items) != count:
            raise Malformed("its pickle takes more than it put")
        self._stack[-count:] = [items]

    def tuple_since_mark(self, _: None) -> None:
        items = self.since_mark()
        self.push(tuple(items))

    def list_since_mark(self, _: None) -> None:
        items = self.since_mark()
        self.push(items)

    def dict_since_mark(self, _: None) -> None:
        items = self.since_mark()
        self.push(dict_of(zip(items[::2], items[1::2], strict=True)))

    def set_since_mark(self, _: None) -> None:
        items = self.since_mark()
        self.push({key(item) for item in items})

    def append(self, _: None) -> None:
        value = self._stack.pop()
        self._extend([value])

    def appends(self, _: None) -> None:
        values = self.since_mark()
        self._extend(values)

    def add_items(self, _: None) -> None:
        values = self.since_mark()
        target = self._stack[-1]
        if isinstance(target, set):
            target.update(key(value) for value in values)
        elif not isinstance(target, Stub):
            raise Malformed("its pickle adds to what is not a set")

    def set_item(self, _: None) -> None:
        value, name = self._stack.pop(), self._stack.pop()
        self._update([name, value])

    def set_items(self, _: None) -> None:
        pairs = self.since_mark()
        self._update(pairs)

    def protocol(self, number: int) -> None:
        self._protocol = number

    def named(self, names: tuple[str, str]) -> None:
        self.push(self._global(*names))

    def stack_global(self, _: None) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self.push(self._global(module, name))

    def instance(self, names: tuple[str, str]) -> None:
        args = self.since_mark()
        self.push(self._called(self._global(*names), tuple(args)))

    def object(self, _: None) -> None:
        cls, *args = self.since_mark()
        self.push(self._called(cls, tuple(args)))

    def reduce(self, _: None) -> None:
        args, function = self._stack.pop(), self._stack.pop()
        self.push(self._called(function, args))

    def new(self, _: None) -> None:
        args, cls = self._stack.pop(), self._stack.pop()
        self.push(new(cls, args))

    def new_ex(self, _: None) -> None:
        kwargs, args, cls = self._stack.pop(), self._stack.pop(), self._stack.pop()
        self.push(new(cls, (args, kwargs)))

    def build(self, _: None) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if isinstance(target, Stub):
            target.state = state
        elif isinstance(target, Global):
            raise Unsafe(target.path)

    def persistent_id(self, _: None) -> None:
        self.push(self._persistent(self._stack.pop()))

    def ignore(self, _: Any) -> None:
        """Frames say nothing that we need."""

    def _global(self, module: Any, name: Any) -> Global:
        if not isinstance(module, str) or not isinstance(name, str) or len(module) + len(name) > r.MAX_LINE:
            raise Malformed("its pickle has a global whose name is not text")
        if self._protocol < 3:  # written under Python 2's names: `commands.Popen` is `subprocess.Popen`
            module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        return Global(f"{module}.{name}")

    def _called(self, function: Any, args: Any) -> Any:
        if not isinstance(args, tuple):
            raise Malformed("its pickle calls something without arguments")
        if not isinstance(function, Global):
            raise Unsafe(function.cls if isinstance(function, Stub) else type(function).__name__)
        self._budget.charge(args)
        return self._call(function, args)

    def _extend(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(values)
        elif not isinstance(target, Stub):
            raise Malformed("its pickle appends to what is not a list")

    def _update(self, pairs: list[Any]) -> None:
        target = self._stack[-1]
        items = target.items if isinstance(target, Stub) else target
        if not isinstance(items, dict):
            raise Malformed("its pickle sets an item of what is not a dict")
        items.update(dict_of(zip(pairs[::2], pairs[1::2], strict=True)))


def new(cls: Any, args: Any) -> Stub:
    """An inert instance; as in pickle itself, no constructor runs."""
    if not isinstance(cls, Global):
        raise Malformed("its pickle makes an instance of what is not a class")
    return Stub(cls.path, args)


def dict_of(pairs: Any) -> dict[Any, Any]:
    """A dict whose keys are safe to hash."""
    return {key(name): value for name, value in pairs}


def key(value: Any, *, nested: bool = True) -> Any:
    """The value, if hashing it is cheap: nested tuples and giant numbers can be made to hash for ever."""
    if isinstance(value, int) and abs(value) < MAX_KEY:
        return value
    if isinstance(value, str | float | Global | Stub | Span) or value is None:
        return value
    if isinstance(value, tuple) and nested and len(value) < 64:
        return tuple(key(item, nested=False) for item in value)
    raise Malformed(f"its pickle uses a {type(value).__name__} as a key")


def _constant(value: Any) -> Callable[[Reader], Any]:
    return lambda _: value


_ROWS: dict[bytes, tuple[Callable[[Reader], Any], Callable[[Machine, Any], None]]] = {
    b"\x80": (r.u1, Machine.protocol), b"\x95": (r.u8, Machine.ignore),
    b"N": (r.nothing, Machine.push), b"\x88": (_constant(True), Machine.push),
    b"\x89": (_constant(False), Machine.push), b")": (_constant(()), Machine.push),
    b"]": (lambda _: [], Machine.push), b"}": (lambda _: {}, Machine.push),
    b"\x8f": (lambda _: set(), Machine.push),
    b"K": (r.u1, Machine.push), b"M": (r.u2, Machine.push), b"J": (r.i4, Machine.push),
    b"\x8a": (r.long1, Machine.push), b"\x8b": (r.long4, Machine.push), b"G": (r.f8, Machine.push),
    b"I": (r.number_line, Machine.push), b"L": (r.number_line, Machine.push),
    b"F": (r.float_line, Machine.push), b"S": (r.quoted_line, Machine.push),
    b"V": (r.unicode_line, Machine.push), b"\x8c": (r.text1, Machine.push),
    b"X": (r.text4, Machine.push), b"\x8d": (r.text8, Machine.push), b"U": (r.latin1, Machine.push),
    b"T": (r.latin4, Machine.push), b"C": (r.span1, Machine.push), b"B": (r.span4, Machine.push),
    b"\x8e": (r.span8, Machine.push), b"\x96": (r.span8, Machine.push),
    b"(": (r.nothing, Machine.mark), b"0": (r.nothing, Machine.pop), b"1": (r.nothing, Machine.pop_mark),
    b"2": (r.nothing, Machine.dup), b"p": (r.number_line, Machine.put), b"q": (r.u1, Machine.put),
    b"r": (r.u4, Machine.put), b"\x94": (r.nothing, Machine.memoize),
    b"g": (r.number_line, Machine.get), b"h": (r.u1, Machine.get), b"j": (r.u4, Machine.get),
    b"\x85": (_constant(1), Machine.tuple_of), b"\x86": (_constant(2), Machine.tuple_of),
    b"\x87": (_constant(3), Machine.tuple_of), b"t": (r.nothing, Machine.tuple_since_mark),
    b"l": (r.nothing, Machine.list_since_mark), b"d": (r.nothing, Machine.dict_since_mark),
    b"\x91": (r.nothing, Machine.set_since_mark), b"a": (r.nothing, Machine.append),
    b"e": (r.nothing, Machine.appends), b"\x90": (r.nothing, Machine.add_items),
    b"s": (r.nothing, Machine.set_item), b"u": (r.nothing, Machine.set_items),
    b"c": (r.two_lines, Machine.named), b"\x93": (r.nothing, Machine.stack_global),
    b"i": (r.two_lines, Machine.instance), b"o": (r.nothing, Machine.object),
    b"R": (r.nothing, Machine.reduce), b"\x81": (r.nothing, Machine.new),
    b"\x92": (r.nothing, Machine.new_ex), b"b": (r.nothing, Machine.build),
    b"Q": (r.nothing, Machine.persistent_id),
}  # fmt: skip
_OPCODES = {code[0]: row for code, row in _ROWS.items()}
