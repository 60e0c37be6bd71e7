"""An Evaluator over a table: what is right comes from a function of the recipe, and every pass is counted.

Everything but the predictions is the real thing: scores, early stopping, memory and journal.
"""

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from fractions import Fraction
from typing import Any, cast

import numpy as np

from clipmerge.checkpoint.tensors import Checkpoint, Extent, Tensor
from clipmerge.data.split import Split
from clipmerge.evaluate.evaluator import Evaluator
from clipmerge.weights.coefficient import Coefficient
from clipmerge.weights.weights import Weights

Recipe = tuple[tuple[str, str], ...]


def point(name: str) -> Weights:
    """A checkpoint of one number in memory; the name decides the number."""
    raw = np.frombuffer(hashlib.sha256(name.encode()).digest()[:2] + b"\0\0", np.uint8)
    checkpoint = Checkpoint(name, {"x": Tensor("I32", (1,), (Extent(raw, 0, 4),))})
    return Weights({checkpoint: Coefficient.of(1)}, checkpoint)


def recipe(weights: Weights) -> Recipe:
    return tuple(sorted((leaf.name, str(c)) for leaf, c in weights.terms.items()))


class TableSplit(Split):
    """A split whose images nobody looks at."""

    @property
    def digest(self) -> str:  # type: ignore[override]
        return self.source


class Table:
    """A predictor: class 0 is always right, and `bits(recipe, split)` is whether a model says so."""

    def __init__(self, bits: Callable[[Recipe, str], Any]) -> None:
        self.bits = bits
        self.asked: list[tuple[Recipe, str]] = []
        self.images = 0

    def key(self, split: str, weights: Weights | None = None) -> list[Any]:
        return ["a table"]

    def together(self, weights: Any) -> Any:
        return nullcontext()

    @property
    def resident(self) -> "Table":
        return self

    def expect(self, order: Sequence[Weights]) -> None:
        pass

    def load(self, weights: Weights) -> None:
        self.weights = weights

    def hold(self) -> None:
        self.mean = self.weights

    def lerp(self, candidate: Weights, t: float) -> None:
        share = Fraction(1, round(1 / t))
        self.weights = self.mean * (1 - share) + candidate * share

    def rows(self, split: str, order: Any) -> Iterator[tuple[Any, Any]]:
        self.asked.append((recipe(self.weights), split))
        right = np.asarray(self.bits(recipe(self.weights), split), bool)
        size = max(1, len(order) // 25)
        for start in range(0, len(order), size):
            chunk = order[start : start + size]
            self.images += len(chunk)
            yield chunk, np.stack([~right[chunk], right[chunk], np.ones(len(chunk))], axis=1).astype(float)


def table_evaluator(
    sizes: Mapping[str, int], bits: Callable[[Recipe, str], Any], **options: Any
) -> tuple[Evaluator, Table]:
    """An evaluator that asks a table, and the table."""
    table, nobody_looks = Table(bits), cast("Any", None)
    splits = {
        name: TableSplit(
            name, ("right", "wrong"), np.zeros(n, np.int64), ("",) * n, nobody_looks, np.arange(n)
        )
        for name, n in sizes.items()
    }
    return Evaluator(splits, predictor=cast("Any", table), **options), table


def random_bits(seed: int, size: int, right: float = 0.5) -> Callable[[Recipe, str], Any]:
    """A table without any structure: each recipe's answers are drawn on their own."""

    def bits(made: Recipe, split: str) -> Any:
        text = f"{seed} {split} {made}".encode()
        draw = np.random.default_rng(int.from_bytes(hashlib.sha256(text).digest()[:8], "big"))
        return draw.random(size) < right

    return bits
