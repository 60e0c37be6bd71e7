"""Weights → text: the same notation in Python, on the command line, in TOML and inside every file."""

from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING

from clipmerge.checkpoint.tensors import Checkpoint, identifiers
from clipmerge.weights.coefficient import Coefficient, number_text
from clipmerge.weights.weights import Weights

if TYPE_CHECKING:
    from clipmerge.weights.methods import Applied


FUNCTIONS = ("interpolate", "mean", "sum")
"""What the notation calls besides the methods. `sum` is what `mean` is: no summand is the base."""


def baseless_sum(weights: Sequence[Weights]) -> Weights:
    """The sum in which every summand counts the same, in whatever order: what `sum([...])` writes."""
    if not weights:
        return Weights({}, None)
    summed = weights[0]
    for other in weights[1:]:
        summed = summed + other
    return Weights(summed.terms, None)


def identifiers_of(weights: Weights) -> dict[Checkpoint, str]:
    """A distinct identifier for every checkpoint, in an order that does not depend on how they were listed."""
    ordered = sorted(weights.checkpoints, key=lambda c: (c.name, str(c.path)))
    words = identifiers([c.name for c in ordered])
    return dict(zip(ordered, words, strict=True))


def notation(weights: Weights) -> str:
    """The expression as text that `parse` reads back: `mean([a, b])`; `base + 0.4*(a - base)` is `0.6*base + 0.4*a`.

    It does not depend on the order in which equal-ranking checkpoints were listed.
    """
    return _text(weights, identifiers_of(weights))


def _text(weights: Weights, names: dict[Checkpoint, str]) -> str:
    if not weights.terms:
        return "0"
    shown = {leaf: _leaf_text(leaf, names) for leaf in weights.terms}
    coefficients = set(weights.terms.values())
    if weights.base is None and coefficients == {Coefficient.of(Fraction(1, len(shown)))}:
        return (
            f"mean([{', '.join(sorted(shown.values()))}])" if len(shown) > 1 else next(iter(shown.values()))
        )
    order = sorted(shown, key=lambda leaf: (leaf is not weights.base, shown[leaf]))
    parts = [_term(weights.terms[leaf], shown[leaf]) for leaf in order]
    if weights.base is None and len(parts) > 1:
        return f"sum([{', '.join(('-' if sign == '-' else '') + part for sign, part in parts)}])"
    text = ""
    for sign, part in parts:
        text += f" {sign} {part}" if text else (f"-{part}" if sign == "-" else part)
    return text


def _term(coefficient: Coefficient, leaf: str) -> tuple[str, str]:
    value = coefficient.constant
    if value is None:
        return "+", f"{coefficient}*{leaf}"
    sign, size = ("-", -value) if value < 0 else ("+", value)
    return sign, leaf if size == 1 else f"{number_text(size)}*{leaf}"


def _leaf_text(leaf: "Checkpoint | Applied", names: dict[Checkpoint, str]) -> str:
    if isinstance(leaf, Checkpoint):
        return names[leaf]
    operands = ", ".join(_text(operand, names) for operand in leaf.operands)
    options = "".join(f", {key}={value!r}" for key, value in leaf.options.items())
    return f"{leaf.method.name}([{operands}]{options})"
