"""Coefficients: exact rationals, constant or per tensor name.

A coefficient is a polynomial over pattern maps, kept exact with `Fraction`: `1 - 0.4 - 0.4` is 1/5, and
`M - M` vanishes whatever the map M says. A float counts as the decimal that it prints as.
"""

import json
from collections.abc import Mapping
from fractions import Fraction
from functools import partial
from numbers import Rational

from clipmerge.errors import RecipeError
from clipmerge.weights.names import matches

Scalar = float | int | Fraction
PatternMap = tuple[tuple[str, Fraction], ...]
"""(pattern, value) pairs in order: the first pattern that matches a name decides, no match means 0."""
MAX_PRODUCTS = 256
"""Products of pattern maps in one coefficient: (M1 + 1)·(M2 + 1)·… doubles with each factor, and records of files
from elsewhere are parsed too."""
MAX_BITS = 1000
"""Of a coefficient's numerator and denominator: what float64 can still hold."""


def exact(number: Scalar) -> Fraction:
    """The rational that the number's shortest decimal form names: 0.1 is 1/10.

    Raises:
        RecipeError: the number is NaN or infinite.
    """
    if isinstance(number, Rational):
        return Fraction(number)
    try:
        return Fraction(repr(float(number)))
    except ValueError as error:
        raise RecipeError(f"a coefficient must be a finite number, not {number}") from error


class Coefficient:
    """An exact coefficient; `at(name)` is its value for one tensor."""

    __slots__ = ("_terms",)

    def __init__(self, terms: Mapping[tuple[PatternMap, ...], Fraction]) -> None:
        self._terms = {factors: value for factors, value in terms.items() if value}

    @classmethod
    def of(
        cls, value: "Scalar | Mapping[str, float] | Mapping[str, Fraction] | Coefficient"
    ) -> "Coefficient":
        """From a number, a mapping from name patterns to numbers, or itself."""
        if isinstance(value, Coefficient):
            return value
        if isinstance(value, Mapping):
            rules = tuple((str(pattern), exact(number)) for pattern, number in value.items())
            return cls({(rules,): Fraction(1)})
        return cls({(): exact(value)})

    def __add__(self, other: "Coefficient") -> "Coefficient":
        if not isinstance(other, Coefficient):
            return NotImplemented
        merged = dict(self._terms)
        for factors, value in other._terms.items():
            merged[factors] = merged.get(factors, Fraction(0)) + value
        return Coefficient(merged)

    def __neg__(self) -> "Coefficient":
        return Coefficient({factors: -value for factors, value in self._terms.items()})

    def __sub__(self, other: "Coefficient") -> "Coefficient":
        return self + -other if isinstance(other, Coefficient) else NotImplemented

    def __mul__(self, other: "Coefficient") -> "Coefficient":
        if not isinstance(other, Coefficient):
            return NotImplemented
        if len(self._terms) * len(other._terms) > MAX_PRODUCTS:
            raise RecipeError("too many mappings are multiplied with each other")
        product: dict[tuple[PatternMap, ...], Fraction] = {}
        for mine, a in self._terms.items():
            for theirs, b in other._terms.items():
                factors = tuple(sorted(mine + theirs))
                product[factors] = product.get(factors, Fraction(0)) + a * b
        return Coefficient(product)

    def __truediv__(self, other: "Coefficient") -> "Coefficient":
        if not isinstance(other, Coefficient):
            return NotImplemented
        divisor = other.constant
        if divisor is None:
            raise RecipeError("only division by a number means something")
        if divisor == 0:
            raise RecipeError("division by zero")
        return self * Coefficient({(): 1 / divisor})

    def masked(self, mask: Mapping[str, int]) -> "Coefficient":
        """Multiply by a mapping of zeros and ones; once more changes nothing."""
        ((rules,),) = Coefficient.of(mask)._terms
        masked = Coefficient({})
        for factors, value in self._terms.items():
            once = factors if rules in factors else tuple(sorted((*factors, rules)))
            masked = masked + Coefficient({once: value})
        return masked

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Coefficient) and self._terms == other._terms

    def __hash__(self) -> int:
        return hash(frozenset(self._terms.items()))

    def __bool__(self) -> bool:
        """False where the coefficient is 0 for every name."""
        return bool(self._terms)

    @property
    def constant(self) -> Fraction | None:
        """The value where it is the same for every name, else None."""
        if set(self._terms) <= {()}:
            return self._terms.get((), Fraction(0))
        return None

    @property
    def patterns(self) -> tuple[str, ...]:
        """Every pattern that it names, sorted."""
        return tuple(sorted({p for factors in self._terms for rules in factors for p, _ in rules}))

    @property
    def is_large(self) -> bool:
        """Whether it holds more than coefficients need: a number beyond float64, or very many products."""
        bits = [n.bit_length() for v in self._terms.values() for n in (v.numerator, v.denominator)]
        return max(bits, default=0) > MAX_BITS or len(self._terms) > MAX_PRODUCTS

    def at(self, name: str) -> Fraction:
        """The value for the tensor of this name."""
        if len(self._terms) == 1 and () in self._terms:
            return self._terms[()]
        return sum((value * _product(factors, name) for factors, value in self._terms.items()), Fraction(0))

    def __str__(self) -> str:
        first, *others = sorted(self._terms.items()) or [((), Fraction(0))]
        text = _term_text(*first)
        for factors, value in others:
            text += f" {'-' if value < 0 else '+'} {_term_text(factors, abs(value))}"
        return f"({text})" if others else text

    __repr__ = __str__


def _product(factors: tuple[PatternMap, ...], name: str) -> Fraction:
    value = Fraction(1)
    for rules in factors:
        value *= next((number for pattern, number in rules if matches(pattern, name)), Fraction(0))
    return value


def _term_text(factors: tuple[PatternMap, ...], value: Fraction) -> str:
    quoted = partial(json.dumps, ensure_ascii=False)  # in double quotes, as Python and JSON alike read it
    maps = ["{" + ", ".join(f"{quoted(p)}: {number_text(v)}" for p, v in rules) + "}" for rules in factors]
    return "*".join(([number_text(value)] if value != 1 or not maps else []) + maps)


def number_text(value: Fraction) -> str:
    """Shortest text that reads back as exactly this rational: an integer, a decimal, or `1/3`."""
    if value.denominator == 1:
        return str(value.numerator)
    try:
        text = repr(value.numerator / value.denominator)
    except OverflowError:
        text = "0"
    return text if Fraction(text) == value else f"{value.numerator}/{value.denominator}"
