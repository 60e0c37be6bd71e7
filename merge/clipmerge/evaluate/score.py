"""The result of evaluating one model on one split, in full or stopped early, and the rule that compares results."""

import base64
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np

from clipmerge.errors import SelectionError
from clipmerge.evaluate.metrics import METRICS, Predictions, all_metrics, interval, mcnemar, metric_interval
from clipmerge.evaluate.retrieval import Ranks
from clipmerge.text import did_you_mean
from clipmerge.types import Bools, Ints

__all__ = ["Score", "Stopped", "check_metric", "is_better", "read_result", "score_of"]


@dataclass(frozen=True, eq=False, repr=False)
class Score:
    """A full pass over a split.

    Attributes:
        metric: the deciding metric's name.
        metrics: every metric that the split allows, by name.
        interval: 95 % for the deciding metric.
        correct_mask: shape (n,): whether each image's top-1 is right; in retrieval whether each query's is, images and
            then captions.
        predictions: shape (n,): the predicted classes; None for a score that was remembered.
        images_scored: images that went through the model for it: 0 for a score that was remembered.
    """

    metric: str
    metrics: Mapping[str, float]
    interval: tuple[float, float]
    correct_mask: Bools = field(repr=False)
    predictions: Ints | None = field(default=None, repr=False)
    images_scored: int = 0

    def __repr__(self) -> str:
        low, high = (100 * end for end in self.interval)
        value = f"{self.metric} {100 * self.value:.2f} %"
        counted = "queries" if METRICS[self.metric].retrieval else "images"
        return f"Score({value}, 95 %: {low:.1f}–{high:.1f}, {self.n} {counted})"

    @property
    def value(self) -> float:
        """The deciding metric's value."""
        return self.metrics[self.metric]

    @property
    def n(self) -> int:
        return len(self.correct_mask)

    @cached_property
    def correct(self) -> int:
        """Images whose top-1 is right."""
        return int(self.correct_mask.sum())

    @property
    def figure(self) -> Fraction:
        """The deciding value as a number that compares exactly, larger being better."""
        return _figure(self.metric, self.value, self.n)

    def p_value(self, other: "Score") -> float:
        """Compute McNemar's exact p of the two models' top-1 on the same images."""
        return mcnemar(self.correct_mask, other.correct_mask)

    def to_json(self, *, mask: bool = False) -> dict[str, Any]:
        """Return what `json.dumps` takes; with `mask` (for journals) `read_result` makes a Score of it again."""
        document: dict[str, Any] = {
            "metric": self.metric,
            "value": float(self.value),
            "interval": [float(end) for end in self.interval],
            "correct": self.correct,
            "n": self.n,
            "metrics": {name: float(value) for name, value in self.metrics.items()},
        }
        return document | {"bits": _pack(self.correct_mask)} if mask else document


@dataclass(frozen=True)
class Stopped:
    """A pass that was stopped because its model could no longer be better than the incumbent.

    Attributes:
        at_most: the deciding metric's value if every image that was not scored were right.
        images_scored: images that went through the model: 0 for a result that was remembered.
    """

    metric: str
    at_most: float
    n: int
    images_scored: int

    @property
    def figure(self) -> Fraction:
        """`at_most` as a number that compares exactly, larger being better."""
        return _figure(self.metric, self.at_most, self.n)

    def to_json(self) -> dict[str, Any]:
        """Return what a journal keeps, and `read_result` reads."""
        return {"metric": self.metric, "at_most": self.at_most, "seen": self.images_scored, "n": self.n}


def is_better(new: Score | Stopped, old: Score | None, *, strict: bool = False) -> bool:
    """Decide whether a result displaces the incumbent: it is at least as good or, with `strict`, better.

    For a stopped pass the answer is about the best that it could still reach: False is certain, True is not.
    """
    if old is None:
        return True
    return new.figure > old.figure if strict else new.figure >= old.figure


def _figure(metric: str, value: float, n: int) -> Fraction:
    # A share of n images is the count that it came from, so that top-1 never hangs on how a division was rounded.
    if metric == "top1":
        return Fraction(round(value * n), n)
    return Fraction(value) if METRICS[metric].higher_is_better else -Fraction(value)


def score_of(predictions: Predictions | Ranks, metric: str) -> Score:
    """Compute the score of a full pass."""
    metrics, ends = all_metrics(predictions), metric_interval(metric, predictions)
    if isinstance(predictions, Ranks):
        return Score(metric, metrics, ends, predictions.first, images_scored=len(predictions.texts))
    return Score(metric, metrics, ends, predictions.right, predictions.predicted, len(predictions))


def read_result(record: Mapping[str, Any], metric: str) -> Score | Stopped | None:
    """Read what `to_json` wrote, as a result by `metric`; None where it lacks the metric or is damaged."""
    try:
        n = int(record["n"])
        if "correct" not in record:
            return Stopped(metric, float(record["at_most"]), n, 0) if record["metric"] == metric else None
        metrics = {str(name): float(value) for name, value in record["metrics"].items()}
        mask = _unpack(record["bits"], n)
        if int(mask.sum()) != int(record["correct"]) or metric not in metrics:
            return None
        low, high = (float(end) for end in record["interval"])
        if (
            record["metric"] != metric
        ):  # the interval of a share of n images stands in for the one not recorded
            low, high = interval(metrics[metric] * n, n)
        return Score(metric, metrics, (low, high), mask)
    except (KeyError, TypeError, ValueError, AttributeError, zlib.error):
        return None


def _pack(mask: Bools) -> str:
    """Write booleans as short text: packed, deflated, base 64."""
    return base64.b64encode(zlib.compress(np.packbits(mask).tobytes(), 9)).decode()


def _unpack(text: str, count: int) -> Bools:
    """Read the `count` booleans that `_pack` wrote, without inflating more than they need."""
    raw = zlib.decompressobj().decompress(base64.b64decode(text, validate=True), count // 8 + 1)
    if len(raw) * 8 < count:
        raise ValueError("too few bits")
    return np.unpackbits(np.frombuffer(raw, np.uint8), count=count).astype(np.bool_)


def check_metric(metric: str, *, grouped: bool, captioned: bool) -> str:
    """Return `metric`, where it exists and the data can be measured by it.

    Raises:
        SelectionError: it does not, or cannot.
    """
    if metric not in METRICS:
        hint = did_you_mean(metric, METRICS, f"use one of {', '.join(METRICS)}")
        raise SelectionError(f"there is no metric {metric!r}", hint=hint)
    lacks = "groups" if metric == "worst_group" and not grouped else ""
    lacks = "captions" if METRICS[metric].retrieval and not captioned else lacks
    if lacks:
        raise SelectionError(
            f"{metric} needs images {'in' if lacks == 'groups' else 'with'} {lacks}, and these have none",
            hint="use --metric top1",
        )
    return metric
