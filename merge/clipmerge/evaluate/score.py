"""What one pass of one model over one split says."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from clipmerge.errors import SelectionError
from clipmerge.evaluate.metrics import METRICS, Predictions, all_metrics, interval, mcnemar, metric_interval
from clipmerge.text import nearest

__all__ = ["Score", "check_metric", "score_of"]

Bits = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Score:
    """A full pass over a split.

    Attributes:
        metric: the deciding metric's name.
        metrics: every metric that the split allows, by name.
        interval: 95 % for the deciding metric.
        bits: shape (n,): whether each image's top-1 is right.
        predictions: shape (n,): the predicted classes; None for a score read from a journal.
        images_scored: images that went through the model for it.
    """

    metric: str
    metrics: Mapping[str, float]
    interval: tuple[float, float]
    bits: Bits = field(repr=False)
    predictions: npt.NDArray[np.int64] | None = field(default=None, repr=False)
    images_scored: int = 0

    @property
    def value(self) -> float:
        """The deciding metric's value."""
        return self.metrics[self.metric]

    @property
    def n(self) -> int:
        return len(self.bits)

    @cached_property
    def correct(self) -> int:
        """Images whose top-1 is right."""
        return int(self.bits.sum())

    def p_value(self, other: "Score") -> float:
        """McNemar's exact p of the two models' top-1 on the same images."""
        return mcnemar(self.bits, other.bits)

    def to_dict(self, *, arrays: bool = False) -> dict[str, Any]:
        """JSON-able; with `arrays` it can be read back by `from_dict`."""
        document: dict[str, Any] = {
            "metric": self.metric,
            "value": self.value,
            "interval": list(self.interval),
            "correct": self.correct,
            "n": self.n,
            "metrics": dict(self.metrics),
        }
        if arrays:
            document["bits"] = base64.b64encode(np.packbits(self.bits).tobytes()).decode()
        return document

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "Score":
        """The score that `to_dict(arrays=True)` wrote, without its predictions."""
        raw = np.frombuffer(base64.b64decode(document["bits"]), np.uint8)
        bits = np.unpackbits(raw, count=document["n"]).astype(np.bool_)
        low, high = document["interval"]
        return cls(document["metric"], dict(document["metrics"]), (low, high), bits)

    @classmethod
    def from_journal(
        cls,
        *,
        metric: str,
        metrics: Mapping[str, float],
        bits: Bits,
        interval: tuple[float, float] | None = None,
    ) -> "Score":
        """A score paid for earlier; without its interval, the one of a share of n images with this value."""
        return cls(metric, dict(metrics), interval or _share(metrics[metric], len(bits)), bits)


def _share(value: float, n: int) -> tuple[float, float]:
    return interval(value * n, n)


def score_of(predictions: Predictions, metric: str, *, images_scored: int | None = None) -> Score:
    """The score of a full pass."""
    return Score(
        metric,
        all_metrics(predictions),
        metric_interval(metric, predictions),
        predictions.right,
        predictions.predicted,
        len(predictions) if images_scored is None else images_scored,
    )


def check_metric(metric: str, *, grouped: bool) -> str:
    """`metric`, where it exists and the data can be measured by it.

    Raises:
        SelectionError: it does not, or cannot.
    """
    if metric not in METRICS:
        close = nearest(metric, METRICS)
        known = ", ".join(METRICS)
        raise SelectionError(
            f"there is no metric {metric!r}",
            hint=f"did you mean {close}?" if close else f"use one of {known}",
        )
    if metric == "worst_group" and not grouped:
        raise SelectionError(
            "worst_group needs images in groups, and these have none", hint="use --metric top1"
        )
    return metric
