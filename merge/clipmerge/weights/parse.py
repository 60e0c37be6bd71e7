"""Text → expression: Python's syntax tree, walked over the operators that expressions and coefficients have.

    base + 0.4*((a - base) + (b - base))
    mean([a, b, c])                 sum([0.7*a, 0.3*b])          interpolate(a, b, 1/3)
    base + {"visual": 0.4}*(a - base)                            slerp([a, b], alpha=0.3)

Names stand for checkpoints, numbers keep their decimal text exactly, a mapping gives each tensor its own
coefficient, and a call is a method of `methods.METHODS` or one of `mean`, `sum`, `interpolate` and `vector` (which says
that a file is a difference, where it does not say so itself). Nothing is ever
evaluated by Python. The text may come from the record of a stranger's file, so its length and depth, and the size of
its numbers, are bounded.
"""

import ast
import operator
import re
import warnings
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Generic, TypeAlias
from unicodedata import normalize

from clipmerge.errors import ClipmergeError, RecipeError
from clipmerge.text import did_you_mean
from clipmerge.weights.coefficient import Coefficient, Scalar
from clipmerge.weights.expression import (
    E,
    Expression,
    OptionValue,
    as_vector,
    baseless_sum,
    interpolate,
    mean,
)
from clipmerge.weights.methods import METHODS, apply

MAX_LENGTH = 200_000
"""Characters: a thousand ingredients with long names fit."""
MAX_DEPTH = 50
"""Parentheses within parentheses; a chain such as `a + b + c` counts once, however long."""

_DECIMAL = re.compile(r"(?:\d[\d_]*\.?[\d_]*|\.\d[\d_]*)(?:[eE]([+-]?\d{1,3}))?")
_GRAMMAR = 'names, numbers, + - * /, {"pattern": number}, mean([a, b]), interpolate(a, b, 0.5), methods'
_CALLS = ("interpolate", "mean", "sum", "vector")
_OPERATORS: Mapping[type[ast.operator], Any] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
}  # fmt: skip

Value: TypeAlias = E | Coefficient


def parse(
    text: str,
    names: Mapping[str, E],
    *,
    numbers: Mapping[str, Scalar] | None = None,
    options: Mapping[str, OptionValue] | None = None,
) -> E:
    """Read the expression that `text` writes, over the checkpoints in `names`.

    Args:
        numbers: names that stand for numbers, such as the one that is searched.
        options: given to every method that has them and is not told otherwise.

    Raises:
        RecipeError: bad syntax (the place is shown), an unknown name, method or option (the nearest known one
            is named), a name that is given but never used, or a meaning that does not exist (weights times
            weights).
    """
    parser = _Parser(text, names, numbers or {}, options or {})
    tree = parser.tree()
    try:
        value = parser.value(tree, 0)
    except ClipmergeError as error:
        # The tree counts the bytes of UTF-8, people count characters.
        offset = len(parser.text.encode()[: parser.at.col_offset].decode(errors="ignore"))
        raise parser.refused(error.message, offset, error.hint) from None
    if isinstance(value, Coefficient):
        raise RecipeError("the expression is a number, not weights", hint="multiply it with a checkpoint")
    for name in sorted(parser.names.keys() - parser.used):
        raise RecipeError(
            f"the checkpoint {name!r} is given but the expression does not use it",
            hint=did_you_mean(name, parser.used, "leave it out"),
        )
    return value


def names_in(text: str) -> frozenset[str]:
    """Return the names that an expression uses, of checkpoints and numbers; none where it cannot be read."""
    try:
        nodes = list(ast.walk(ast.parse(text.strip(), mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return frozenset()
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    return frozenset(node.id for node in nodes if isinstance(node, ast.Name) and id(node) not in called)


class _Parser(Generic[E]):
    """One text, the names it may use, those it has used, and `at`, the part that is read: where errors point."""

    at: ast.expr

    def __init__(
        self,
        text: str,
        names: Mapping[str, E],
        numbers: Mapping[str, Scalar],
        options: Mapping[str, OptionValue],
    ) -> None:
        self.numbers, self.options = numbers, options
        self.text = " ".join(text.splitlines()).strip() if "\n" in text.strip() else text.strip()
        self.names = {
            normalize("NFKC", name): weights for name, weights in names.items()
        }  # as Python reads them
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
            offset = error.offset - 1 if error.text and error.offset else len(self.text)
            raise self.refused(error.msg, offset) from None
        except (RecursionError, MemoryError):
            raise RecipeError("the expression is nested too deeply") from None
        except ValueError as error:  # a null byte
            raise RecipeError(f"the expression cannot be read: {error}") from None

    def refused(self, message: str, offset: int, hint: str | None = None) -> RecipeError:
        """The message, the text around the place, and a caret under it."""
        start = max(0, offset - 60)
        return RecipeError(
            f"{message} (character {offset + 1} of the expression)\n"
            f"  {self.text[start : offset + 40]}\n  {' ' * (offset - start)}^",
            hint=hint or f"an expression is made of {_GRAMMAR}",
        )

    def value(self, node: ast.expr, depth: int) -> "Value[E]":
        self.at = node
        if depth > MAX_DEPTH:
            raise RecipeError(f"nested more than {MAX_DEPTH} deep")
        match node:
            case ast.BinOp():
                return self._chain(node, depth)
            case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=operand):
                value = self.value(operand, depth + 1)
                return -value if isinstance(sign, ast.USub) else value
            case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
                source = self._source(
                    node
                )  # the number as written: the float of 0.1 has forgotten that it is 1/10
                if _DECIMAL.fullmatch(source) is None or len(source) > 400:
                    raise RecipeError(f"{source[:40]!r} is not a decimal number")
                return _small(Coefficient.of(Fraction(source)))
            case ast.Name(id=name) if name in self.names:
                self.used.add(name)
                return self.names[name]
            case ast.Name(id=name) if name in self.numbers:
                return Coefficient.of(self.numbers[name])
            case ast.Name(id=name):
                hint = did_you_mean(name, self.names, f"name its file: {name}=FILE")
                raise RecipeError(f"there is no checkpoint {name!r}", hint=hint)
            case ast.Dict():
                return self._mapping(node, depth)
            case ast.Call():
                return self._call(node, depth)
        raise RecipeError(f"{self._source(node)!r} is not part of the notation")

    def _chain(self, node: ast.expr, depth: int) -> "Value[E]":
        """`a + b - c*d`: down the left side without recursion, so that long sums are not deep."""
        links: list[ast.BinOp] = []
        while isinstance(node, ast.BinOp):
            links.append(node)
            node = node.left
        value = self.value(node, depth + 1)
        for link in reversed(links):
            right = self.value(link.right, depth + 1)
            self.at = link.right
            if type(link.op) not in _OPERATORS:
                raise RecipeError(f"{self._source(link)!r} uses an operator other than + - * /")
            try:
                value = _small(_OPERATORS[type(link.op)](value, right))
            except TypeError:
                if isinstance(link.op, ast.Div):
                    raise RecipeError("only division by a number means something") from None
                message = "weights and a number cannot be added"
                raise RecipeError(message, hint="did you mean to multiply?") from None
        return value

    def _mapping(self, node: ast.Dict, depth: int) -> Coefficient:
        rules: dict[str, Fraction] = {}
        for key, entry in zip(node.keys, node.values, strict=True):
            self.at = key or node
            if not isinstance(key, ast.Constant) or not isinstance(key.value, str):
                raise RecipeError('the keys of a mapping are patterns in quotes, such as "visual.*"')
            if key.value in rules:
                raise RecipeError(f"the pattern {key.value!r} stands twice")
            rules[key.value] = self._constant(entry, depth, "the values of a mapping are numbers")
        return Coefficient.of(rules)

    def _constant(self, node: ast.expr, depth: int, otherwise: str) -> Fraction:
        number = self.value(node, depth + 1)
        constant = number.constant if isinstance(number, Coefficient) else None
        if constant is None:
            raise RecipeError(otherwise)
        return constant

    def _call(self, node: ast.Call, depth: int) -> E:
        if not isinstance(node.func, ast.Name):
            raise RecipeError(f"{self._source(node.func)!r} cannot be called")
        name, known = node.func.id, sorted([*_CALLS, *METHODS])
        if name not in known:
            raise RecipeError(
                f"there is no method {name!r}", hint=did_you_mean(name, known, ", ".join(known))
            )
        arguments: Sequence[ast.expr] = node.args
        if len(arguments) == 1 and isinstance(arguments[0], ast.List | ast.Tuple):
            arguments = arguments[0].elts  # f([a, b]) and f(a, b) are one thing
        options: dict[str, OptionValue] = {}
        merged: E | None = None
        statistics: list[E] | None = None
        for keyword in node.keywords:
            if keyword.arg is None:
                raise RecipeError(f"{self._source(node)!r} is not part of the notation")
            if name == "interpolate" and keyword.arg == "alpha":  # which may be a mapping
                arguments = [*arguments, keyword.value]
                continue
            if name in METHODS and keyword.arg == "merged":
                value = self.value(keyword.value, depth + 1)
                if isinstance(value, Coefficient):
                    raise RecipeError(f"{name} takes weights as merged, not the number {value}")
                merged = value
                continue
            if (
                name in METHODS
                and keyword.arg == "statistics"
                and isinstance(keyword.value, ast.List | ast.Tuple)
            ):
                files = [self.value(entry, depth + 1) for entry in keyword.value.elts]
                statistics = [file for file in files if not isinstance(file, Coefficient)]
                continue
            options[keyword.arg] = self._option(keyword.arg, keyword.value, depth)
        values = [self.value(argument, depth + 1) for argument in arguments]
        self.at = node
        if name in METHODS:
            shared = {key: v for key, v in self.options.items() if key in METHODS[name].all_options}
            options = {**shared, **options}
        return _called(name, values, options, merged, statistics)

    def _option(self, name: str, node: ast.expr, depth: int) -> OptionValue:
        """A number, a word in quotes, True, False, None, or a list of numbers."""
        if isinstance(node, ast.Constant) and (node.value is None or isinstance(node.value, str | bool)):
            return node.value
        otherwise = f"the option {name!r} takes a number"
        if isinstance(node, ast.List | ast.Tuple):
            return tuple(float(self._constant(entry, depth, otherwise)) for entry in node.elts)
        return float(self._constant(node, depth, otherwise))

    def _source(self, node: ast.expr) -> str:
        return ast.get_source_segment(self.text, node) or ""


def _small(value: "Value[E]") -> "Value[E]":
    if isinstance(value, Coefficient) and value.is_large:
        raise RecipeError("the number is too large or too long to be a coefficient")
    return value


def _called(
    name: str,
    values: "Sequence[Value[E]]",
    options: Mapping[str, OptionValue],
    merged: E | None,
    statistics: list[E] | None,
) -> E:
    if name in _CALLS and options:
        hint = "interpolate(a, b, alpha=0.5)" if name == "interpolate" else None
        raise RecipeError(f"{name} has no option {next(iter(options))!r}", hint=hint)
    if name == "interpolate":
        match values:
            case [Expression() as a, Expression() as b, Coefficient() as alpha]:
                return interpolate(a, b, alpha)
        raise RecipeError("interpolate takes two weights and a number", hint="interpolate(a, b, 0.5)")
    operands: list[E] = []
    for value in values:
        if isinstance(value, Coefficient):
            raise RecipeError(f"{name} takes weights, not the number {value}")
        operands.append(value)
    if name in METHODS:
        return apply(name, operands, merged, statistics, **options)
    if not operands:
        raise RecipeError(f"{name} takes at least one checkpoint")
    if name == "vector":
        if len(operands) > 1:
            raise RecipeError("vector takes one checkpoint", hint="vector(a) + vector(b)")
        return as_vector(operands[0])
    return mean(operands) if name == "mean" else baseless_sum(operands)
