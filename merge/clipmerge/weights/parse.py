"""Text → Weights: a small grammar over Python's syntax tree. Nothing is ever evaluated by Python.

    base + 0.4*((a - base) + (b - base))
    mean([a, b, c])                 sum([0.7*a, 0.3*b])          interpolate(a, b, 1/3)
    base + {"visual": 0.4}*(a - base)                            slerp([a, b], t=0.3)

Names stand for checkpoints, numbers keep their decimal text exactly, a mapping gives each tensor its own
coefficient, and a call is a method of `methods.METHODS` or one of `mean`, `sum`, `interpolate`.
"""

import ast
import re
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

from clipmerge.errors import ClipmergeError, RecipeError
from clipmerge.text import nearest
from clipmerge.weights.coefficient import Coefficient
from clipmerge.weights.methods import METHODS, apply
from clipmerge.weights.notation import FUNCTIONS, baseless_sum
from clipmerge.weights.weights import Weights, interpolate, mean

MAX_LENGTH = 200_000
"""Characters: a thousand ingredients with long names fit."""
MAX_DEPTH = 50
"""Parentheses within parentheses; a chain such as `a + b + c` counts once, however long."""
MAX_BITS = 1000
"""Of a coefficient's numerator and denominator: what float64 can still hold."""
MAX_MAPS = 256

_DECIMAL = re.compile(r"(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE]([+-]?\d{1,3}))?")
_GRAMMAR = 'names, numbers, + - * /, {"pattern": number}, mean([a, b]), interpolate(a, b, 0.5), methods'

Value = Weights | Coefficient


def parse(text: str, names: Mapping[str, Weights]) -> Weights:
    """The expression that `text` writes, over the checkpoints in `names`.

    Raises:
        RecipeError: bad syntax (the place is shown), an unknown name, method or option (the nearest known one
            is named), a name that is given but never used, or a meaning that does not exist (weights times
            weights).
    """
    reader = _Parser(text, {unicodedata.normalize("NFKC", name): value for name, value in names.items()})
    value = reader.value(reader.tree(), 0)
    if not isinstance(value, Weights):
        raise RecipeError("the expression is a number, not weights", hint="multiply it with a checkpoint")
    for name in sorted(reader.names.keys() - reader.used):
        close = nearest(name, reader.used)
        raise RecipeError(
            f"the checkpoint {name!r} is given but the expression does not use it",
            hint=f"leave it out, or is it {close!r} that was meant?" if close else "leave it out",
        )
    return value


class _Parser:
    """One text, the names it may use, and those it has used."""

    def __init__(self, text: str, names: Mapping[str, Weights]) -> None:
        self.text = " ".join(text.splitlines()).strip() if "\n" in text.strip() else text.strip()
        self.names = names
        self.used: set[str] = set()
        if not self.text:
            raise RecipeError("the expression is empty", hint=f"an expression is made of {_GRAMMAR}")
        if len(text) > MAX_LENGTH:
            raise RecipeError(f"the expression has {len(text):,} characters; at most {MAX_LENGTH:,} are read")
        if "#" in text and "\n" in text.strip():
            raise RecipeError("comments are no part of an expression", hint="put them on lines of their own")

    def tree(self) -> ast.expr:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Python's advice about literals is not about this notation
                return ast.parse(self.text, mode="eval").body
        except SyntaxError as error:
            ends_early = not error.text or not error.offset
            at = len(self.text) if ends_early else (error.offset or 1) - 1
            raise self._shown(error.msg, at, counts_bytes=False) from None
        except (RecursionError, MemoryError):
            raise RecipeError("the expression is nested too deeply") from None
        except ValueError as error:  # a null byte
            raise RecipeError(f"the expression cannot be read: {error}") from None

    def value(self, node: ast.expr, depth: int) -> Value:
        if depth > MAX_DEPTH:
            raise self._error(node, f"nested more than {MAX_DEPTH} deep")
        match node:
            case ast.BinOp():
                return self._chain(node, depth)
            case ast.UnaryOp(op=ast.USub() | ast.UAdd(), operand=operand):
                inner = self.value(operand, depth + 1)
                return inner if isinstance(node.op, ast.UAdd) else _times(inner, Coefficient.of(-1))
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                return Coefficient.of(self._number(node))
            case ast.Name(id=name):
                return self._named(name)
            case ast.Dict():
                return self._mapping(node, depth)
            case ast.Call():
                return self._call(node, depth)
        raise self._error(node, f"{self._source(node)!r} is not part of the notation")

    def _chain(self, node: ast.expr, depth: int) -> Value:
        """`a + b - c*d`: down the left side without recursion, so that long sums are not deep."""
        rest: list[ast.BinOp] = []
        while isinstance(node, ast.BinOp):
            rest.append(node)
            node = node.left
        value = self.value(node, depth + 1)
        for step in reversed(rest):
            right = self.value(step.right, depth + 1)
            operation = _OPERATIONS.get(type(step.op))
            if operation is None:
                raise self._error(step.right, f"{self._source(step)!r} uses an operator other than + - * /")
            try:
                value = operation(value, right)
            except ClipmergeError as error:
                raise self._error(step.right, error.message, hint=error.hint) from None
            if isinstance(value, Coefficient) and not _modest(value):
                raise self._error(step.right, "the number is too large or too long to be a coefficient")
        return value

    def _number(self, node: ast.Constant) -> Fraction:
        source = self._source(node)
        written = _DECIMAL.fullmatch(source)
        if written is None or len(source) > 400:
            raise self._error(node, f"{source[:40]!r} is not a decimal number")
        number = Fraction(source)
        if not _modest(Coefficient.of(number)):
            raise self._error(node, "the number is too large or too long to be a coefficient")
        return number

    def _named(self, name: str) -> Weights:
        found = self.names.get(name)
        if found is None:
            close = nearest(name, self.names)
            raise RecipeError(
                f"there is no checkpoint {name!r}",
                hint=f"did you mean {close!r}?" if close else f"name its file: {name}=FILE",
            )
        self.used.add(name)
        return found

    def _mapping(self, node: ast.Dict, depth: int) -> Coefficient:
        rules: dict[str, Fraction] = {}
        for key, entry in zip(node.keys, node.values, strict=True):
            if not isinstance(key, ast.Constant) or not isinstance(key.value, str):
                raise self._error(
                    key or node, 'the keys of a mapping are patterns in quotes, such as "visual.*"'
                )
            number = self.value(entry, depth + 1)
            constant = number.constant if isinstance(number, Coefficient) else None
            if constant is None:
                raise self._error(entry, "the values of a mapping are numbers")
            if key.value in rules:
                raise self._error(key, f"the pattern {key.value!r} stands twice")
            rules[key.value] = constant
        return Coefficient.of(rules)

    def _call(self, node: ast.Call, depth: int) -> Weights:
        if not isinstance(node.func, ast.Name):
            raise self._error(node, f"{self._source(node.func)!r} cannot be called")
        name = node.func.id
        if name not in FUNCTIONS and name not in METHODS:
            close = nearest(name, [*FUNCTIONS, *METHODS])
            known = ", ".join(sorted([*FUNCTIONS, *METHODS]))
            raise self._error(
                node, f"there is no method {name!r}", hint=f"did you mean {close!r}?" if close else known
            )
        values = [self.value(item, depth + 1) for item in _listed(node.args)]
        options = {}
        for keyword in node.keywords:
            if keyword.arg is None:
                raise self._error(node, f"{self._source(node)!r} is not part of the notation")
            options[keyword.arg] = self.value(keyword.value, depth + 1)
        try:
            return _called(name, values, options)
        except ClipmergeError as error:
            raise self._error(node, error.message, hint=error.hint) from None

    def _source(self, node: ast.expr) -> str:
        return ast.get_source_segment(self.text, node) or ""

    def _error(self, node: ast.expr, what: str, hint: str | None = None) -> RecipeError:
        return self._shown(what, node.col_offset, hint=hint)

    def _shown(
        self, what: str, offset: int, *, hint: str | None = None, counts_bytes: bool = True
    ) -> RecipeError:
        """The message, the text around the place, and a caret under it."""
        if counts_bytes:
            offset = len(self.text.encode()[:offset].decode(errors="ignore"))
        start = max(0, offset - 60)
        window = self.text[start : offset + 40]
        return RecipeError(
            f"{what} (character {offset + 1} of the expression)\n  {window}\n  {' ' * (offset - start)}^",
            hint=hint or f"an expression is made of {_GRAMMAR}",
        )


def _listed(arguments: Sequence[ast.expr]) -> Sequence[ast.expr]:
    """`f([a, b])` and `f(a, b)` are one thing."""
    if len(arguments) == 1 and isinstance(arguments[0], ast.List | ast.Tuple):
        return arguments[0].elts
    return arguments


def _called(name: str, values: Sequence[Value], options: Mapping[str, Value]) -> Weights:
    if name == "interpolate":
        return _interpolated(values, options)
    operands = []
    for value in values:
        if not isinstance(value, Weights):
            raise RecipeError(f"{name} takes weights, not the number {value}")
        operands.append(value)
    if name in METHODS:
        return apply(name, operands, **{key: _plain(key, option) for key, option in options.items()})
    for option in options:
        raise RecipeError(f"{name} has no option {option!r}")
    return mean(operands) if name == "mean" else baseless_sum(operands)


def _interpolated(values: Sequence[Value], options: Mapping[str, Value]) -> Weights:
    given = [*values, *(options[key] for key in options if key == "alpha")]
    wrong = [key for key in options if key != "alpha"]
    if wrong:
        raise RecipeError(f"interpolate has no option {wrong[0]!r}", hint="interpolate(a, b, alpha=0.5)")
    match given:
        case [Weights() as a, Weights() as b, Coefficient() as alpha]:
            return interpolate(a, b, alpha)
        case _:
            raise RecipeError("interpolate takes two weights and a number", hint="interpolate(a, b, 0.5)")


def _plain(key: str, value: Value) -> float:
    constant = value.constant if isinstance(value, Coefficient) else None
    if constant is None:
        raise RecipeError(f"the option {key!r} takes a number")
    return float(constant)


def _modest(value: Coefficient) -> bool:
    return value.size <= MAX_MAPS and value.bits <= MAX_BITS


def _plus(left: Value, right: Value) -> Value:
    if isinstance(left, Weights) and isinstance(right, Weights):
        return left + right
    if isinstance(left, Coefficient) and isinstance(right, Coefficient):
        return left + right
    raise RecipeError("weights and a number cannot be added", hint="did you mean to multiply?")


def _minus(left: Value, right: Value) -> Value:
    return _plus(left, _times(right, Coefficient.of(-1)))


def _times(left: Value, right: Value) -> Value:
    if isinstance(left, Coefficient) and isinstance(right, Coefficient):
        if left.size * right.size > MAX_MAPS:
            raise RecipeError("too many mappings are multiplied with each other")
        return left * right
    if isinstance(left, Coefficient) and isinstance(right, Weights):
        return right * left
    if isinstance(left, Weights) and isinstance(right, Coefficient):
        return left * right
    raise RecipeError("weights times weights means nothing", hint="multiply by a number or a mapping")


def _over(left: Value, right: Value) -> Value:
    divisor = right.constant if isinstance(right, Coefficient) else None
    if divisor is None:
        raise RecipeError("only division by a number means something")
    if divisor == 0:
        raise RecipeError("division by zero")
    return _times(left, Coefficient.of(1 / divisor))


_OPERATIONS: Mapping[type[ast.operator], Callable[[Value, Value], Value]] = {
    ast.Add: _plus, ast.Sub: _minus, ast.Mult: _times, ast.Div: _over,
}  # fmt: skip
