"""Fisher and RegMean on small arrays: by hand, by least squares, and where there is nothing to go by."""

import numpy as np
import pytest

from clipmerge.ops.statistics import fisher, regmean

rng = np.random.default_rng(0)


def test_fisher_is_the_mean_weighted_entry_by_entry() -> None:
    a, b = np.array([1.0, 2.0, 3.0]), np.array([5.0, 6.0, 7.0])
    of_a, of_b = np.array([3.0, 0.0, 0.0]), np.array([1.0, 2.0, 0.0])
    assert fisher(a, b, statistics=[of_a, of_b]).tolist() == [
        2.0,
        6.0,
        5.0,
    ]  # (3·1 + 1·5) / 4; b alone; the mean
    assert fisher(a, b).tolist() == [3.0, 4.0, 5.0]


def test_fisher_takes_weights_and_a_floor() -> None:
    a, b = np.array([1.0, 1.0]), np.array([2.0, 2.0])
    assert fisher(a, b, statistics=[np.array([1.0, 0]), np.array([1.0, 0])], weights=[3, 1]).tolist() == [
        1.25,
        1.25,
    ]
    floored = fisher(a, b, statistics=[np.array([1.0, 0]), np.array([0.0, 1e-9])], floor=1e-8)
    assert floored == pytest.approx([1 + 1e-8 / (1 + 1e-8), 1.5], abs=1e-15)


def test_equal_models_stay_to_the_bit() -> None:
    point = rng.standard_normal((5, 4)).astype(np.float32)
    merged = fisher(point, point, point, statistics=list(rng.random((3, 5, 4))))
    assert np.array_equal(merged.astype(np.float32), point)


def test_regmean_fits_the_layers_outputs_best() -> None:
    inputs = [rng.standard_normal((50, 6)) * np.geomspace(1, 5, 6) ** s for s in (1, -1)]
    layers = [rng.standard_normal((4, 6)) for _ in inputs]
    merged = regmean(*layers, statistics=[x.T @ x for x in inputs], off_diagonal=1.0)
    stacked = np.vstack(inputs)
    outputs = np.vstack([x @ layer.T for x, layer in zip(inputs, layers, strict=True)])
    best, *_ = np.linalg.lstsq(stacked, outputs, rcond=None)
    assert merged == pytest.approx(best.T, abs=1e-10)


def test_regmean_is_the_published_formula() -> None:
    inputs = [rng.standard_normal((20, 3)) for _ in range(3)]
    layers = [rng.standard_normal((2, 3)) for _ in inputs]
    squares = [0.95 * x.T @ x + 0.05 * np.diag(np.diag(x.T @ x)) for x in inputs]
    expected = sum(w @ g for w, g in zip(layers, squares, strict=True)) @ np.linalg.inv(sum(squares))
    assert regmean(*layers, statistics=[x.T @ x for x in inputs]) == pytest.approx(expected, abs=1e-12)
    turned = regmean(*(w.T for w in layers), statistics=[x.T @ x for x in inputs], transposed=True)
    assert turned == pytest.approx(expected.T, abs=1e-12)


def test_regmean_averages_what_no_input_reaches() -> None:
    layers = [np.array([[1.0, 10.0]]), np.array([[3.0, 20.0]])]
    squares = [np.diag([3.0, 0.0]), np.diag([1.0, 0.0])]
    assert regmean(*layers, statistics=squares) == pytest.approx(np.array([[1.5, 15.0]]))
    assert regmean(*layers).tolist() == [[2.0, 15.0]]
    assert regmean(*layers, statistics=[np.zeros((2, 2))] * 2).tolist() == [[2.0, 15.0]]
