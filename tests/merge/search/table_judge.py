"""An evaluator over a table: scores come from a function of the recipe, and every pass is counted."""

import hashlib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from clipmerge.checkpoint.tensors import Checkpoint, Extent, Tensor
from clipmerge.evaluate.metrics import interval
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


@dataclass(frozen=True)
class TableScore:
    bits: Any
    metric: str = "top1"

    @property
    def correct(self) -> int:
        return int(self.bits.sum())

    @property
    def n(self) -> int:
        return len(self.bits)

    @property
    def value(self) -> float:
        return self.correct / self.n

    @property
    def metrics(self) -> Mapping[str, float]:
        return {"top1": self.value}

    @property
    def interval(self) -> tuple[float, float]:
        return interval(self.correct, self.n)


@dataclass(frozen=True)
class TableOutcome:
    accepted: bool
    score: TableScore | None
    bound: float
    images_scored: int


class TableJudge:
    """`bits(recipe, split)` is what a model gets right. `asked` lists every pass that was paid for."""

    metric = "top1"

    def __init__(self, sizes: Mapping[str, int], bits: Callable[[Recipe, str], Any], seed: int = 0) -> None:
        self.splits = {name: range(n) for name, n in sizes.items()}
        self.bits = bits
        self.asked: list[tuple[Recipe, str]] = []
        self.images = 0
        self.draw = random.Random(seed)

    def data_key(self, split: str | None = None) -> str:
        return f"data-{split}"

    def load(self, weights: Weights) -> None:
        """Nothing is kept between passes."""

    def score(self, weights: Weights, split: str | None = None) -> TableScore:
        assert split is not None
        self.asked.append((recipe(weights), split))
        self.images += len(self.splits[split])
        return TableScore(np.asarray(self.bits(recipe(weights), split), bool))

    def scores(self, weights: Weights) -> dict[str, TableScore]:
        return {split: self.score(weights, split) for split in self.splits}

    def trial(self, split: str | None = None, strict: bool = False) -> "TableTrial":
        assert split is not None
        return TableTrial(self, split, strict)


class TableTrial:
    """Looks at images in a random order, and stops once the incumbent is out of reach."""

    def __init__(self, judge: TableJudge, split: str, strict: bool) -> None:
        self.judge, self.split, self.strict = judge, split, strict

    def learn(self, score: Any) -> None:
        """The order is random in any case."""

    def begin(self, weights: Weights, score: Any = None) -> Any:
        self.mean, self.incumbent = weights, score
        return score

    def propose(self, candidate: Weights, t: float, *, early_stop: bool = True) -> TableOutcome:
        share = Fraction(1, round(1 / t))
        mixed = self.mean * (1 - share) + candidate * share
        self.judge.asked.append((recipe(mixed), self.split))
        bits = np.asarray(self.judge.bits(recipe(mixed), self.split), bool)
        needed = self.incumbent.correct + self.strict
        order = list(range(len(bits)))
        self.judge.draw.shuffle(order)
        wrong = 0
        for seen, image in enumerate(order, 1):
            wrong += not bits[image]
            if early_stop and len(bits) - wrong < needed:
                self.judge.images += seen
                return TableOutcome(False, None, (len(bits) - wrong) / len(bits), seen)
        self.judge.images += len(bits)
        score = TableScore(bits)
        return TableOutcome(score.correct >= needed, score, score.value, len(bits))


def random_bits(seed: int, size: int, right: float = 0.5) -> Callable[[Recipe, str], Any]:
    """A table without any structure: each recipe's answers are drawn on their own."""

    def bits(made: Recipe, split: str) -> Any:
        text = f"{seed} {split} {made}".encode()
        draw = np.random.default_rng(int.from_bytes(hashlib.sha256(text).digest()[:8], "big"))
        return draw.random(size) < right

    return bits
