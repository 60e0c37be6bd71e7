"""Metrics as pure functions of predictions and labels, and how sure they are."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy as np
import numpy.typing as npt

from clipmerge.evaluate.retrieval import RECALLS, Ranks, recall_interval
from clipmerge.types import Bools, Floats, Ints

__all__ = [
    "METRICS",
    "Metric",
    "Predictions",
    "all_metrics",
    "ece",
    "interval",
    "macro_f1",
    "mcnemar",
    "mean_per_class",
    "metric_interval",
    "top1",
    "top5",
    "worst_group",
]

_Z = 1.959963984540054
"""The 97.5 % quantile of the normal distribution, for two-sided 95 % intervals."""

_BINS = 15
_RESAMPLES = 200


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a model said about n images, reduced to what every metric needs; arrays have shape (n,).

    Attributes:
        labels: the true class.
        predicted: the class of the largest logit.
        in_top5: whether the true class is among the five largest logits.
        confidence: the softmax probability of the predicted class.
        groups: the group of each image (WILDS), None where the data has none.
    """

    labels: Ints
    predicted: Ints
    in_top5: Bools
    confidence: Floats
    groups: Ints | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def right(self) -> Bools:
        return np.equal(self.predicted, self.labels)

    def take(self, indices: npt.NDArray[Any]) -> "Predictions":
        """Return the predictions for some of the images, in that order."""
        columns = self.labels, self.predicted, self.in_top5, self.confidence, self.groups
        return Predictions(*(None if column is None else column[indices] for column in columns))  # type: ignore[arg-type]


def top1(p: Predictions) -> float:
    """Return the share of images whose largest logit is the true class."""
    return float(p.right.mean())


def top5(p: Predictions) -> float:
    """Return the share of images whose true class is among the five largest logits."""
    return float(p.in_top5.mean())


def mean_per_class(p: Predictions) -> float:
    """Average over the classes that occur the share of their images that are right."""
    return float(_rates(p.labels, p.right).mean())


def macro_f1(p: Predictions) -> float:
    """Average the classes' F1 over classes that occur as label or prediction."""
    size = int(max(p.labels.max(), p.predicted.max())) + 1
    true = np.bincount(p.labels, minlength=size)
    guesses = np.bincount(p.predicted, minlength=size)
    hits = np.bincount(p.labels[p.right], minlength=size)
    seen = (true + guesses) > 0
    return float((2 * hits[seen] / (true + guesses)[seen]).mean())


def worst_group(p: Predictions) -> float:
    """Return the lowest top-1 accuracy of any group. Source: Koh et al. 2021, arXiv 2012.07421 (WILDS)."""
    if p.groups is None:
        raise ValueError("worst_group needs groups")
    return float(_rates(p.groups, p.right).min())


def ece(p: Predictions) -> float:
    """Compute the expected calibration error: 15 bins of equal width, |accuracy - confidence| weighted by their images.

    Source: Guo et al. 2017, arXiv 1706.04599.
    """
    inner = np.linspace(0, 1, _BINS + 1)[1:-1]
    bins = np.digitize(p.confidence, inner, right=True)
    gap = np.bincount(bins, p.right.astype(np.float64) - p.confidence, minlength=_BINS)
    return float(np.abs(gap).sum() / len(p))


def _rates(keys: Ints, right: Bools) -> Floats:
    """Return the share of right answers for each key that occurs, in ascending order of keys."""
    counts = np.bincount(keys)
    hits = np.bincount(keys[right], minlength=len(counts))
    there = counts > 0
    return np.asarray(hits[there] / counts[there], np.float64)


@dataclass(frozen=True)
class Metric:
    """A metric by name: how it is computed, which way is better, and its words in a table.

    Attributes:
        retrieval: it is computed from `Ranks` of images with captions, not from `Predictions` of classes.
    """

    compute: Callable[[Any], float]
    title: str
    higher_is_better: bool = True
    retrieval: bool = False


METRICS: Mapping[str, Metric] = {
    "top1": Metric(top1, "top-1"),
    "top5": Metric(top5, "top-5"),
    "mean_per_class": Metric(mean_per_class, "mean per class"),
    "macro_f1": Metric(macro_f1, "macro-F1"),
    "worst_group": Metric(worst_group, "worst group"),
    "ece": Metric(ece, "ECE", higher_is_better=False),
    **{name: Metric(compute, title, retrieval=True) for name, (compute, title) in RECALLS.items()},
}


def all_metrics(p: Predictions | Ranks) -> dict[str, float]:
    """Compute every metric that the predictions or ranks allow."""
    if isinstance(p, Ranks):
        return {name: metric.compute(p) for name, metric in METRICS.items() if metric.retrieval}
    left_out = set() if p.groups is not None else {"worst_group"}
    return {n: m.compute(p) for n, m in METRICS.items() if not m.retrieval and n not in left_out}


def interval(correct: float, n: int) -> tuple[float, float]:
    """Compute Wilson's 95 % interval for a proportion. Source: Wilson 1927.

    Written out because scipy.stats takes a second to import, and every score has an interval.

    Args:
        correct: how many of the n, not a share.
    """
    if n == 0:
        return 0.0, 1.0
    share = correct / n
    scale = 1 + _Z**2 / n
    middle = (share + _Z**2 / (2 * n)) / scale
    half = _Z * sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def metric_interval(name: str, p: Predictions | Ranks) -> tuple[float, float]:
    """Compute a 95 % interval for a metric: Wilson's for shares of images, the bootstrap's for the rest."""
    if isinstance(p, Ranks):
        return recall_interval(METRICS[name].compute, p)
    if name == "top1":
        return interval(int(p.right.sum()), len(p))
    if name == "top5":
        return interval(int(p.in_top5.sum()), len(p))
    draws = np.random.default_rng(0)
    values = [METRICS[name].compute(p.take(draws.integers(0, len(p), len(p)))) for _ in range(_RESAMPLES)]
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def mcnemar(a: Bools, b: Bools) -> float:
    """Compute the two-sided p of McNemar's exact test that a and b are right equally often.

    Args:
        a: which images one model has right.
        b: the same of the other model, on the same images.
    """
    from scipy.special import bdtr

    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return min(1.0, 2 * float(bdtr(min(only_a, only_b), only_a + only_b, 0.5))) if only_a + only_b else 1.0
