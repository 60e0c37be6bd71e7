"""Expression → text: the same notation in Python, on the command line, in TOML and inside every file."""

import json
from fractions import Fraction

from clipmerge.checkpoint.tensors import Checkpoint, identifiers
from clipmerge.weights.coefficient import Coefficient, number_text
from clipmerge.weights.expression import Expression, Leaf, OptionValue


def identifiers_of(weights: Expression) -> dict[Checkpoint, str]:
    """Name every checkpoint by a distinct identifier, in an order that does not depend on how they were listed."""
    ordered = sorted(weights.sources, key=lambda c: (c.name, str(c.path)))
    return dict(zip(ordered, identifiers([c.name for c in ordered]), strict=True))


def notation(weights: Expression) -> str:
    """Write the expression as text that `parse` reads back: `mean([a, b])`; `base + 0.4*(a - base)` is
    `0.6*base + 0.4*a`.

    It does not depend on the order in which equal-ranking checkpoints were listed.
    """
    return _text(weights, identifiers_of(weights))


def _text(weights: Expression, names: dict[Checkpoint, str]) -> str:
    if not weights.terms:
        return "0"
    leaves = {leaf: _leaf_text(leaf, names) for leaf in weights.terms}
    share = Coefficient.of(Fraction(1, len(leaves)))
    if weights.base is None and all(coefficient == share for coefficient in weights.terms.values()):
        operands = sorted(leaves.values())
        return f"mean([{', '.join(operands)}])" if len(operands) > 1 else operands[0]
    order = sorted(leaves, key=lambda leaf: (leaf is not weights.base, leaves[leaf]))
    terms = [(weights.terms[leaf], leaves[leaf]) for leaf in order]
    if weights.base is None and len(terms) > 1:
        return f"sum([{', '.join(sum_text([term]) for term in terms)}])"
    return sum_text(terms)


def sum_text(terms: list[tuple[Coefficient, str]]) -> str:
    """Write `0.6*base - 0.4*a` for terms (coefficient, leaf's text)."""
    text = ""
    for coefficient, leaf in terms:
        value = coefficient.constant
        negative = value is not None and value < 0
        if value is None:
            part = f"{coefficient}*{leaf}"
        else:
            part = leaf if abs(value) == 1 else f"{number_text(abs(value))}*{leaf}"
        if text:
            text += f" {'-' if negative else '+'} {part}"
        else:
            text = f"-{part}" if negative else part
    return text or "0"


def _leaf_text(leaf: Leaf, names: dict[Checkpoint, str]) -> str:
    if isinstance(leaf, Checkpoint):
        return f"vector({names[leaf]})" if "vector" in leaf.extra else names[leaf]
    operands = ", ".join(_text(operand, names) for operand in leaf.operands)
    merged = "" if leaf.merged is None else f", merged={_text(leaf.merged, names)}"
    files = ", ".join(names[file] for file in leaf.statistics)
    merged += f", statistics=[{files}]" if files else ""
    options = "".join(f", {key}={_option_text(value)}" for key, value in leaf.options.items())
    return f"{leaf.method.name}([{operands}]{merged}{options})"


def _option_text(value: OptionValue) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(repr, value))}]"
    return json.dumps(value) if isinstance(value, str) else repr(value)
