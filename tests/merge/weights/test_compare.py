"""Distances and cosines, against numpy on the whole tensors."""

from collections.abc import Callable

import numpy as np
import pytest

from clipmerge.errors import MismatchError
from clipmerge.weights import look as module
from clipmerge.weights.look import Comparison, compare
from clipmerge.weights.weights import Weights, interpolate

Point = Callable[..., Weights]
NAMES = (
    "visual.conv1.weight",
    "visual.transformer.resblocks.0.x",
    "visual.transformer.resblocks.0.y",
    "logit_scale",
)


@pytest.fixture
def family(point: Point) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, Weights]]:
    rng = np.random.default_rng(0)
    arrays = {
        n: {
            name: rng.standard_normal(() if name == "logit_scale" else (40, 7)).astype("f4") for name in NAMES
        }
        for n in ("a", "b", "base")
    }
    return arrays, {n: point(n, **tensors) for n, tensors in arrays.items()}


def test_by_an_independent_formula(family, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays, weights = family
    monkeypatch.setattr(module, "PIECE", 33)  # several pieces for a tensor
    found = compare(weights["a"], weights["b"], weights["base"])
    parts = {(p.tower, p.block): p for p in (*found.parts, found.whole)}
    groups = {
        ("visual", None): NAMES[:1],
        ("visual", 0): NAMES[1:3],
        ("other", None): NAMES[3:],
        (None, None): NAMES,
    }
    assert set(parts) == set(groups)
    for key, names in groups.items():
        a, b, base = (
            np.concatenate([arrays[n][x].ravel() for x in names]).astype("f8") for n in ("a", "b", "base")
        )
        part = parts[key]
        assert part.tensors == len(names)
        assert part.parameters == a.size
        assert part.relative == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(a), rel=1e-12)
        assert part.largest == pytest.approx(np.abs(a - b).max(), rel=1e-12)
        u, v = a - base, b - base
        assert part.cosine == pytest.approx(u @ v / (np.linalg.norm(u) * np.linalg.norm(v)), rel=1e-10)
        assert part.vector_a == pytest.approx(np.linalg.norm(u), rel=1e-12)
        assert part.vector_b == pytest.approx(np.linalg.norm(v), rel=1e-12)
    assert found.differing == tuple(sorted(NAMES))
    assert found.to_json()["whole"]["tensors"] == 4


def test_equal_weights(family) -> None:
    _, weights = family
    found = compare(weights["a"], weights["a"])
    assert isinstance(found, Comparison)
    assert (found.whole.relative, found.whole.largest, found.differing) == (0.0, 0.0, ())
    assert found.whole.cosine is None


def test_expressions_and_other_dtypes_compare_as_what_they_compute(family, point: Point) -> None:
    _, weights = family
    half = interpolate(weights["a"], weights["b"], 0.5)
    found = compare(weights["a"], half, weights["a"])
    full = compare(weights["a"], weights["b"])
    assert found.whole.relative == pytest.approx((full.whole.relative or 0) / 2, rel=1e-12)
    a, b = point("a", x=[1.0, 2.0]), point("b", x=("BF16", [1.0, 3.0]))
    assert compare(a, b).whole.largest == 1.0


def test_zero_has_no_relative_distance_and_no_cosine(point: Point) -> None:
    a, b = point("a", x=[0.0]), point("b", x=[1.0])
    assert compare(a, b).whole.relative is None
    assert compare(a, b, a).whole.cosine is None


def test_integers_are_left_out_and_misfits_refused(point: Point) -> None:
    a, b = (point(n, x=[1.0], ids=np.arange(2)) for n in "ab")
    assert compare(a, b).whole.tensors == 1
    with pytest.raises(MismatchError):
        compare(a, point("c", x=[1.0, 2.0], ids=np.arange(2)))
    with pytest.raises(MismatchError):
        compare(a, b, point("c", y=[1.0], ids=np.arange(2)))


def test_what_is_not_finite_is_never_the_smallest_difference(point: Point) -> None:
    found = compare(point("a", x=[1.0, 2.0], y=[3.0]), point("b", x=[1.0, float("nan")], y=[4.0]))
    assert np.isnan(found.whole.largest)
    assert found.differing == ("x", "y")
