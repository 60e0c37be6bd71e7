"""Scores for a search: asked of an evaluator once, remembered in a journal, never paid for twice."""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Protocol

from clipmerge.checkpoint.tensors import Checkpoint
from clipmerge.distributed import broadcast_object, is_first
from clipmerge.errors import SelectionError
from clipmerge.search.journal import Bits, Journal, pack_bits, unpack_bits
from clipmerge.text import nearest

if TYPE_CHECKING:
    from clipmerge.weights.expression import Expression
    from clipmerge.weights.weights import Weights


class Mark(Protocol):
    """One full pass of one model over one split (`clipmerge.evaluate.evaluator.Score`)."""

    @property
    def metric(self) -> str: ...
    @property
    def value(self) -> float: ...
    @property
    def correct(self) -> int: ...
    @property
    def n(self) -> int: ...
    @property
    def interval(self) -> tuple[float, float]: ...
    @property
    def metrics(self) -> Mapping[str, float]: ...
    @property
    def bits(self) -> Bits: ...


class Judge(Protocol):
    """What a search asks of `clipmerge.Evaluator` (or, in tests, of a table of scores)."""

    @property
    def splits(self) -> Mapping[str, Any]: ...
    @property
    def metric(self) -> str: ...
    def load(self, weights: "Weights") -> None: ...
    def data_key(self, split: str | None = None) -> str: ...
    def score(self, weights: "Weights", split: str | None = None) -> Any: ...
    def scores(self, weights: "Weights") -> Mapping[str, Any]: ...
    def trial(self, split: str | None = None, strict: bool = False) -> Any: ...


@dataclass(frozen=True)
class Bound:
    """A trial that was stopped: its metric can be no better than `value`, after `seen` of `n` images."""

    value: float
    seen: int
    n: int


class Scorer:
    """An evaluator and a journal. Under torchrun the first process's journal answers for all.

    Attributes:
        scored: images that went through a model. saved: images that early stopping or the journal spared.
    """

    def __init__(self, judge: Judge, journal: "Journal | str | os.PathLike[str] | None" = None) -> None:
        self.judge = judge
        self.journal = journal if isinstance(journal, Journal) or journal is None else Journal(journal)
        self.scored = 0
        self.saved = 0
        self._data: dict[str, str] = {}
        self._paid: dict[str, Any] = {}
        self._digests: dict[Checkpoint, str] = {}

    @property
    def metric(self) -> str:
        return self.judge.metric

    def size(self, split: str) -> int:
        """The number of images of a split."""
        return len(self.judge.splits[split])

    def split(self, name: str) -> str:
        """`name`, or the only split there is where no split has that name.

        Raises:
            SelectionError: several splits, and none of that name.
        """
        splits = self.judge.splits
        if name in splits:
            return name
        if len(splits) == 1:
            return next(iter(splits))
        close = nearest(name, splits)
        raise SelectionError(
            f"there is no split {name!r} among {', '.join(map(repr, splits)) or 'none'}",
            hint=f"did you mean {close!r}?" if close else "give the evaluator a split of that name",
        )

    def score(self, weights: "Weights", split: str) -> Any:
        """The Mark of `weights` on `split`, from the journal or from a full pass."""
        key = self.key(weights, split)
        known = self.known(key, split)
        if known is not None and not isinstance(known, Bound):
            self.saved += known.n
            return known
        return self.learn(key, weights, split, self.judge.score(weights, split))

    def scores(self, weights: "Weights", splits: Sequence[str]) -> dict[str, Any]:
        """Marks on several splits; the weights are loaded once where nothing is known of them."""
        keys = {split: self.key(weights, split) for split in splits}
        whole = len(splits) > 1 and set(splits) == set(self.judge.splits)
        if whole and not any(self.known(key, split) for split, key in keys.items()):
            marks = self.judge.scores(weights)
            return {split: self.learn(keys[split], weights, split, marks[split]) for split in splits}
        return {split: self.score(weights, split) for split in splits}

    def learn(self, key: str, weights: "Weights", split: str, mark: Any) -> Any:
        """Remember a full pass."""
        self.scored += mark.n
        self._paid[key] = mark
        metrics = {name: float(value) for name, value in mark.metrics.items()}
        record: dict[str, Any] = {"correct": int(mark.correct), "n": int(mark.n), "metrics": metrics}
        record |= {"metric": mark.metric, "interval": [float(end) for end in mark.interval]}
        self._write(key, weights, split, record | {"bits": pack_bits(mark.bits)})
        return mark

    def learn_bound(self, key: str, weights: "Weights", split: str, bound: Bound) -> None:
        """Remember a pass that was stopped."""
        self.scored += bound.seen
        self.saved += bound.n - bound.seen
        record = {"metric": self.metric, "at_most": bound.value, "seen": bound.seen, "n": bound.n}
        self._write(key, weights, split, record)

    def known(self, key: str, split: str) -> Any:
        """A Mark, a Bound or None: what has been paid for under `key`."""
        if key in self._paid:
            return self._paid[key]
        if self.journal is None:
            return None
        record = broadcast_object(self.journal.get(key))
        found = None if record is None else read_record(record, self.metric)
        if found is None or found.n != self.size(split):
            return None
        self._paid[key] = found
        return found

    def key(self, weights: "Weights", split: str) -> str:
        """What a score is filed under: the recipe, and all that it depends on beside the weights."""
        if split not in self._data:
            if self.journal is not None:
                self.judge.load(weights)  # the model may be what the first weights record
            self._data[split] = split if self.journal is None else self.judge.data_key(split)
        return f"{recipe_digest(weights, self._digest)}:{self._data[split]}"

    def _digest(self, checkpoint: Checkpoint) -> str:
        """The content digest; without a journal nobody else will compare, and identity will do."""
        if checkpoint not in self._digests:
            from clipmerge.weights.digest import content_digest

            alone = self.journal is None
            self._digests[checkpoint] = str(id(checkpoint)) if alone else content_digest(checkpoint)
        return self._digests[checkpoint]

    def _write(self, key: str, weights: "Weights", split: str, record: Mapping[str, Any]) -> None:
        if self.journal is None:
            return
        if is_first():
            self.journal.put(key, {"split": split, "weights": repr(weights), **record})


def scorer_of(evaluator: "Judge | Scorer", journal: "Journal | str | os.PathLike[str] | None") -> Scorer:
    """A scorer over `evaluator`, or `evaluator` itself where it is one."""
    return evaluator if isinstance(evaluator, Scorer) else Scorer(evaluator, journal)


def read_record(record: Mapping[str, Any], metric: str) -> Any:
    """A journal's record as the Mark or Bound that it was; None where it lacks the metric or is damaged."""
    from clipmerge.evaluate.score import Score

    try:
        n = int(record["n"])
        if "correct" not in record:
            bound = Bound(float(record["at_most"]), int(record["seen"]), n)
            return bound if record["metric"] == metric else None
        metrics = {str(name): float(value) for name, value in record["metrics"].items()}
        bits = unpack_bits(record["bits"], n)
        if int(bits.sum()) != int(record["correct"]) or metric not in metrics:
            return None
        low, high = (float(end) for end in record["interval"])
        own = (low, high) if record["metric"] == metric else None
        return Score.from_journal(metric=metric, metrics=metrics, bits=bits, interval=own)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def goodness(mark: Any) -> Fraction:
    """A mark's deciding value for comparisons: exact for top-1, negated where less is better."""
    from clipmerge.evaluate.metrics import METRICS

    if mark.metric == "top1":
        return Fraction(int(mark.correct), int(mark.n))
    return Fraction(float(mark.value)) * (1 if METRICS[mark.metric].higher_is_better else -1)


def mark_document(mark: Any) -> dict[str, Any]:
    """A mark for JSON."""
    return {
        "value": float(mark.value),
        "correct": int(mark.correct),
        "n": int(mark.n),
        "interval": [float(end) for end in mark.interval],
        "metrics": {name: float(value) for name, value in mark.metrics.items()},
    }


def mcnemar_p(first: Any, second: Any) -> float:
    """McNemar's exact p: how surprising the images are on which two models differ, were they equally good."""
    from clipmerge.evaluate.metrics import mcnemar

    return float(mcnemar(first.bits, second.bits))


def recipe_digest(weights: "Weights", digest: Callable[[Checkpoint], str]) -> str:
    """What weights are made of: content digests and exact coefficients, whatever was written to say it."""
    return hashlib.sha256(json.dumps(_recipe(weights, digest)).encode()).hexdigest()[:32]


def _recipe(weights: "Expression", digest: Callable[[Checkpoint], str]) -> list[list[Any]]:
    terms: list[list[Any]] = []
    for leaf, coefficient in weights.terms.items():
        if isinstance(leaf, Checkpoint):
            terms.append([str(coefficient), digest(leaf)])
        else:
            operands = [_recipe(operand, digest) for operand in leaf.operands]
            terms.append(
                [str(coefficient), leaf.method.name, json.dumps(leaf.options, sort_keys=True), operands]
            )
    return sorted(terms, key=json.dumps)
