"""What lies between two models: the scores along the segment, and how far they fall below its ends."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from clipmerge.evaluate.score import Score
from clipmerge.search.sweep import steps
from clipmerge.weights.coefficient import Scalar, exact
from clipmerge.weights.weights import Source, as_weights, interpolate

if TYPE_CHECKING:
    from clipmerge.evaluate.evaluator import Evaluator


@dataclass(frozen=True)
class Barrier:
    """See `barrier`.

    Attributes:
        scores: alpha → score, 0 being the first model.
        height: how far a score lies below the straight line between the ends at most; 0 where none does.
        alpha: where that is.
    """

    split: str
    scores: Mapping[float, Score]
    height: float
    alpha: float

    def to_json(self) -> dict[str, Any]:
        """Return numbers and words, ready for `json.dumps`."""
        scores = [{"alpha": alpha, **score.to_json()} for alpha, score in self.scores.items()]
        return {"split": self.split, "height": self.height, "alpha": self.alpha, "scores": scores}


def barrier(
    a: Source,
    b: Source,
    evaluator: "Evaluator",
    split: str | None = None,
    *,
    grid: Sequence[Scalar] | None = None,
) -> Barrier:
    """Score models on the segment between two, and measure the barrier: the loss below the mean of the ends.

    Args:
        grid: alphas; by default 0, 0.1 … 1. The ends are always among them.

    Source: Frankle et al. 2020, arXiv 1912.05671.
    """
    name = evaluator.split_name(split)
    first, second = as_weights(a), as_weights(b)
    alphas = sorted({Fraction(0), Fraction(1), *map(exact, grid or steps(0, 1, 0.1))})
    scores = {alpha: evaluator.score(interpolate(first, second, alpha), name) for alpha in alphas}
    start, end = scores[Fraction(0)].figure, scores[Fraction(1)].figure
    falls = {alpha: (1 - alpha) * start + alpha * end - score.figure for alpha, score in scores.items()}
    worst = max(falls, key=lambda alpha: (falls[alpha], -alpha))
    found = {float(alpha): score for alpha, score in scores.items()}
    return Barrier(name, found, float(falls[worst]), float(worst))
