"""Text → weights: what is understood, what is refused and how that is said, and the round trip."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipmerge.errors import RecipeError
from clipmerge.weights.expression import Applied, baseless_sum
from clipmerge.weights.methods import apply
from clipmerge.weights.parse import MAX_LENGTH, parse
from clipmerge.weights.weights import Weights, interpolate, mean

Point = Callable[..., Weights]


@pytest.fixture(scope="session")
def names(point: Point) -> dict[str, Weights]:
    return {name: point(name) for name in ("a", "b", "c", "base")}


def only(names: Mapping[str, Weights], used: str) -> dict[str, Weights]:
    return {name: names[name] for name in used.split()}


def same(x: Weights, y: Weights) -> bool:
    """Equal terms and, where it means something, an equal base; methods by name, options and operands."""
    left, right = _plain(x), _plain(y)
    return left == right


def _plain(w: Weights) -> object:
    base = None if w.base is None or len(w.terms) == 1 else _leaf(w.base)
    return frozenset((_leaf(leaf), c) for leaf, c in w.terms.items()), base


def _leaf(leaf: object) -> object:
    if isinstance(leaf, Applied):
        return leaf.method.name, tuple(sorted(leaf.options.items())), tuple(_plain(o) for o in leaf.operands)
    return leaf


def test_the_forms_of_the_notation(names: dict[str, Weights]) -> None:
    a, b, c, base = (names[n] for n in ("a", "b", "c", "base"))
    for text, used, meant in [
        ("a", "a", a),
        ("base + 0.4*(a - base)", "a base", base + 0.4 * (a - base)),
        ("base + 0.4*((a - base) + (b - base))", "a b base", base + 0.4 * ((a - base) + (b - base))),
        ("mean([a, b, c])", "a b c", mean([a, b, c])),
        ("mean(a, b, c)", "a b c", mean([a, b, c])),
        ("mean((a, b))", "a b", mean([a, b])),
        ("sum([0.7*a, 0.3*b])", "a b", baseless_sum([0.7 * a, 0.3 * b])),
        ("interpolate(a, b, 1/3)", "a b", interpolate(a, b, Fraction(1, 3))),
        ("interpolate(a, b, alpha=.25)", "a b", interpolate(a, b, 0.25)),
        ('interpolate(a, b, {"visual": 0.5})', "a b", interpolate(a, b, {"visual": 0.5})),
        ('base + {"visual.block[0:6]": 0.4, "*": 1e-1}*(a - base)', "a base",
         base + {"visual.block[0:6]": 0.4, "*": 0.1} * (a - base)),
        ("-a + +2*b", "a b", -a + 2 * b),
        ("(a + b)/2", "a b", (a + b) / 2),
        ("2/3*a + b/3", "a b", a * Fraction(2, 3) + b * Fraction(1, 3)),
        ("slerp([a, b], alpha=0.3)", "a b", apply("slerp", [a, b], alpha=0.3)),
        ("slerp([a, b], t=0.3)", "a b", apply("slerp", [a, b], alpha=0.3)),  # as files of earlier versions say
        ("base + 0.5*magmax([a - base, b - base])", "a b base",
         base + 0.5 * apply("magmax", [a - base, b - base])),
        ("base + ties([a - base], density=1/5, scope='tensor')", "a base",
         base + apply("ties", [a - base], density=0.2, scope="tensor")),
        ("base + lines([a - base], merged=magmax(a - base), alpha=None, beta=-1, equalise=True)", "a base",
         base + apply("lines", [a - base], apply("magmax", [a - base]), beta=-1.0, equalise=True)),
        ("base + consensus(a - base, b - base, threshold=[.2, .4])", "a b base",
         base + apply("consensus", [a - base, b - base], threshold=(0.2, 0.4))),
        ("  base\n  + 0.4*(a\n  - base)  ", "a base", base + 0.4 * (a - base)),
    ]:  # fmt: skip
        assert same(parse(text, only(names, used)), meant), text


def test_decimals_are_read_exactly(names: dict[str, Weights]) -> None:
    found = parse("0.1234567890123456789*a", only(names, "a"))
    assert next(iter(found.terms.values())).constant == Fraction("0.1234567890123456789")


def test_a_long_sum_is_not_deep(names: dict[str, Weights]) -> None:
    assert same(parse("a" + " + a" * 999, only(names, "a")), 1000 * names["a"])


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("a +", "invalid syntax (character 4 of", "made of names, numbers"),
        ("a + (b", "'(' was never closed (character 5", None),
        ("", "the expression is empty", "made of names, numbers"),
        ("a @ b", "'a @ b' uses an operator other than + - * /", None),
        ("a ** 2", "uses an operator other than", None),
        ("aa", "there is no checkpoint 'aa'", "did you mean a?"),
        ("xyz", "there is no checkpoint 'xyz'", "name its file: xyz=FILE"),
        ("man([a, b])", "there is no method 'man'", "did you mean mean?"),
        ("zzz(a)", "there is no method 'zzz'", "ace, breadcrumbs, cart, consensus, "),
        ("slerp([a, b], alpa=1)", "slerp has no option 'alpa'", "did you mean alpha?"),
        ("mean([a, b], t=1)", "mean has no option 't'", None),
        ("interpolate(a, b, beta=1)", "interpolate has no option 'beta'", "alpha"),
        ("interpolate(a, b)", "interpolate takes two weights and a number", None),
        ("slerp([a])", "slerp takes 2 operands, not 1", None),
        ("magmax([a, b])", "magmax takes task vectors (total 0)", None),
        ("slerp([a, 2])", "slerp takes weights, not the number 2", None),
        ("slerp([a, b], t=a)", "the option 't' takes a number", None),
        ("ties([a - b], merged=a - b)", "ties has no operand 'merged'", "svc and lines"),
        ("svc([a - b], merged=2)", "svc takes weights as merged, not the number 2", None),
        ("ties([a - b], scope=model)", "there is no checkpoint 'model'", None),
        ("ties([a - b], scope=f'x')", "is not part of the notation", None),
        ("a * b", "weights times weights means nothing", "multiply by a number"),
        ("a + 1", "weights and a number cannot be added", None),
        ("a / b", "only division by a number", None),
        ("a / 0", "division by zero", None),
        ("1 + 2", "the expression is a number, not weights", None),
        ("0x10*a", "'0x10' is not a decimal number", None),
        ("1e5000*a", "'1e5000' is not a decimal number", None),
        ("1e900*a", "too large or too long", None),
        ("9" * 500 + "*a", "is not a decimal number", None),
        ("1e200*1e200*a", "too large or too long", None),
        ("True*a", "'True' is not part of the notation", None),
        ("1j*a", "'1j' is not part of the notation", None),
        ("[a]", "'[a]' is not part of the notation", None),
        ("a if b else a", "is not part of the notation", None),
        ("lambda: a", "is not part of the notation", None),
        ("a.b", "'a.b' is not part of the notation", None),
        ("a[0]", "'a[0]' is not part of the notation", None),
        ("(x := a)", "is not part of the notation", None),
        ("a < b", "is not part of the notation", None),
        ("~a", "is not part of the notation", None),
        ("mean(*a)", "'*a' is not part of the notation", None),
        ("mean(**a)", "is not part of the notation", None),
        ("a(b)(a)", "'a(b)' cannot be called", None),
        ("__import__('os').system('true')", "cannot be called", None),
        ("{1: 2}*a", "patterns in quotes", None),
        ('{"x": a}*b', "the values of a mapping are numbers", None),
        ('{"x": 1, "x": 2}*a', "the pattern 'x' stands twice", None),
        ("{**a}*b", "patterns in quotes", None),
        ("a\x00", "null bytes", None),
        ("(" * 60 + "a" + ")" * 60 + "+" + "-" * 60 + "b", "nested more than 50 deep", None),
        ("(" * 999 + "a" + ")" * 999, "nested parentheses", None),
        ("-" * 9999 + "a", "nested too deeply", None),
        ("a" + " " * MAX_LENGTH, "characters; at most", None),
        ("a # now\n + b", "comments are no part", None),
    ],
)
def test_what_is_refused_and_how_that_is_said(
    names: dict[str, Weights], text: str, message: str, hint: str | None
) -> None:
    with pytest.raises(RecipeError) as refused:
        parse(text, only(names, "a b"))
    assert message in refused.value.message
    if hint:
        assert hint in (refused.value.hint or "")


def test_the_place_is_shown(names: dict[str, Weights]) -> None:
    with pytest.raises(RecipeError) as refused:
        parse("0.5*a + wrong(b)", only(names, "a b"))
    assert refused.value.message.splitlines()[1:] == ["  0.5*a + wrong(b)", "          ^"]


def test_the_place_counts_characters_not_bytes(point: Point) -> None:
    with pytest.raises(RecipeError, match=r"character 5 of") as refused:
        parse("é + oops(é)", {"é": point("e")})
    assert refused.value.message.splitlines()[2] == "      ^"


def test_a_checkpoint_that_is_not_used_is_a_mistake(names: dict[str, Weights]) -> None:
    with pytest.raises(RecipeError, match="'base' is given but the expression does not use it"):
        parse("mean([a, b])", only(names, "a b base"))


def test_products_of_mappings_cannot_explode(names: dict[str, Weights]) -> None:
    text = "*".join(f'({{"{i}": 1}} + 1)' for i in range(40)) + "*a"
    with pytest.raises(RecipeError, match="too many mappings"):
        parse(text, only(names, "a"))


NUMBERS = st.fractions(-4, 4, max_denominator=60) | st.decimals(-4, 4, places=4).map(float)
PATTERNS = st.sampled_from(["visual", "text.block[0:6]", "*", 'odd "name"', "back\\slash"])
FACTORS = NUMBERS | st.dictionaries(PATTERNS, NUMBERS, max_size=2)


@st.composite
def expressions(draw: st.DrawFn, names: Mapping[str, Weights], depth: int = 3) -> Weights:
    kind = draw(st.sampled_from(["leaf", "leaf", "plus", "times", "mean", "sum", "slerp", "magmax"]))
    inner = expressions(names, depth - 1)
    if kind == "leaf" or depth == 0:
        return names[draw(st.sampled_from(sorted(names)))]
    if kind == "plus":
        return draw(inner) + draw(inner)
    if kind == "times":
        return draw(inner) * draw(FACTORS)
    if kind == "mean":
        return mean(draw(st.lists(inner, min_size=1, max_size=3)))
    if kind == "sum":
        return baseless_sum(draw(st.lists(inner, min_size=1, max_size=3)))
    a, b = (names[draw(st.sampled_from(sorted(names)))] for _ in range(2))
    if kind == "slerp":
        return apply("slerp", [interpolate(a, b, 0.25), mean([a, b])], alpha=float(draw(NUMBERS)))
    return apply("magmax", [names["a"] - names["c"], names["b"] - names["base"]])


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_what_is_printed_reads_back_as_the_same(names: dict[str, Weights], data: st.DataObject) -> None:
    weights = data.draw(expressions(names))
    if not weights.terms:
        return
    used = {c.name: names[c.name] for c in weights.checkpoints}
    again = parse(repr(weights), used)
    assert same(again, weights), repr(weights)
    assert repr(again) == repr(weights)


@settings(deadline=None, max_examples=200)
@given(
    st.text(st.sampled_from("ab+-*/().,[]{}:\"'0123456789e =#\nmean_\\"), max_size=40) | st.text(max_size=20)
)
def test_any_text_is_understood_or_refused(names: dict[str, Weights], text: str) -> None:
    with suppress(RecipeError):
        assert isinstance(parse(text, only(names, "a")), Weights)
