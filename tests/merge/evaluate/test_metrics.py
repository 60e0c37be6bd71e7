"""Metrics: golden values by hand, and scikit-learn's and scipy's formulas on random predictions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipmerge.evaluate import metrics as m


def predictions(labels, predicted, *, in_top5=None, confidence=None, groups=None) -> m.Predictions:
    labels, predicted = np.asarray(labels), np.asarray(predicted)
    return m.Predictions(
        labels,
        predicted,
        labels == predicted if in_top5 is None else np.asarray(in_top5),
        np.ones(len(labels)) if confidence is None else np.asarray(confidence, float),
        None if groups is None else np.asarray(groups),
    )


def random_predictions(seed: int, n: int = 200, classes: int = 7) -> m.Predictions:
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, classes, n)
    predicted = np.where(draw.random(n) < 0.6, labels, draw.integers(0, classes, n))
    return predictions(labels, predicted, confidence=draw.random(n), groups=draw.integers(0, 4, n))


FOUR = predictions([0, 0, 1, 2], [0, 1, 1, 0], in_top5=[True, True, True, False], groups=[0, 0, 0, 1])


def test_golden_values_by_hand():
    assert m.top1(FOUR) == 2 / 4
    assert m.top5(FOUR) == 3 / 4
    assert m.mean_per_class(FOUR) == pytest.approx((1 / 2 + 1 + 0) / 3)
    assert m.macro_f1(FOUR) == pytest.approx((2 * 1 / 4 + 2 * 1 / 3 + 0) / 3)
    assert m.worst_group(FOUR) == 0.0


def test_calibration_error_by_hand():
    # bins (0.60, 0.67] with accuracy 1/2 and confidence 0.65; (0.93, 1] with accuracy 1 and confidence 0.95
    p = predictions([0, 0, 0], [0, 1, 0], confidence=[0.65, 0.65, 0.95])
    assert m.ece(p) == pytest.approx((2 * 0.15 + 1 * 0.05) / 3)


def test_a_confidence_on_an_edge_belongs_to_the_bin_below():
    p = predictions([0, 0], [0, 1], confidence=[1 / 15, 1 / 15 + 1e-9])
    assert m.ece(p) == pytest.approx(((1 - 1 / 15) + (1 / 15 + 1e-9)) / 2)


@pytest.mark.parametrize("seed", range(5))
def test_agrees_with_scikit_learn(seed):
    from sklearn import metrics as sk

    p = random_predictions(seed)
    assert m.top1(p) == sk.accuracy_score(p.labels, p.predicted)
    assert m.mean_per_class(p) == pytest.approx(sk.balanced_accuracy_score(p.labels, p.predicted))
    assert m.macro_f1(p) == pytest.approx(sk.f1_score(p.labels, p.predicted, average="macro"))
    worst = min(sk.accuracy_score(p.labels[p.groups == g], p.predicted[p.groups == g]) for g in range(4))
    assert m.worst_group(p) == worst


def test_macro_f1_counts_a_class_that_is_only_ever_predicted():
    from sklearn.metrics import f1_score

    p = predictions([0, 0, 1], [0, 5, 1])
    assert m.macro_f1(p) == pytest.approx(f1_score(p.labels, p.predicted, average="macro"))


def test_without_groups_there_is_no_worst_group():
    assert "worst_group" in m.all_metrics(FOUR)
    assert "worst_group" not in m.all_metrics(predictions([0], [0]))


def test_wilson_interval_golden():
    # Newcombe 1998, table I, method 3: 81 of 263 and 0 of 20
    assert m.interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert m.interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


def test_wilson_interval_is_scipys():
    from scipy.stats import binomtest

    for correct, n in ((0, 1), (3, 7), (260, 1000), (26000, 26000)):
        theirs = binomtest(correct, n).proportion_ci(method="wilson")
        assert m.interval(correct, n) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 400), st.floats(0, 1))
def test_wilson_interval_contains_the_share(n, share):
    correct = round(share * n)
    low, high = m.interval(correct, n)
    assert 0 <= low <= correct / n + 1e-12
    assert correct / n - 1e-12 <= high <= 1


def test_bootstrap_interval_is_the_same_every_time_and_contains_the_value():
    p = random_predictions(0)
    low, high = m.metric_interval("macro_f1", p)
    assert (low, high) == m.metric_interval("macro_f1", p)
    assert low < m.macro_f1(p) < high


def test_mcnemar_golden():
    a = np.array([True] * 10 + [False] * 2)
    b = np.array([True] * 4 + [False] * 6 + [True] * 2)  # 6 only a, 2 only b
    assert m.mcnemar(a, b) == pytest.approx(74 / 256)  # 2 · (1 + 8 + 28) / 2^8
    assert m.mcnemar(a, a) == 1.0


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_binomial_test(only_a, only_b):
    from scipy.stats import binomtest

    a = np.array([True] * only_a + [False] * only_b, bool)
    expected = binomtest(only_a, only_a + only_b, 0.5).pvalue if only_a + only_b else 1.0
    assert m.mcnemar(a, ~a) == pytest.approx(expected)
    assert m.mcnemar(~a, a) == m.mcnemar(a, ~a)
