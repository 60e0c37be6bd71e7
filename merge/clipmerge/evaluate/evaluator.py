"""The Evaluator: one resident model that scores weights on splits, and remembers every score."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from clipmerge import distributed
from clipmerge.checkpoint.tensors import Checkpoint
from clipmerge.data.open import open_split
from clipmerge.data.split import Split
from clipmerge.device import out_of_memory_hint, resolve_device, resolve_precision
from clipmerge.errors import NonFiniteError, SelectionError
from clipmerge.evaluate.journal import Journal, recipe_digest
from clipmerge.evaluate.metrics import METRICS, Predictions
from clipmerge.evaluate.predictor import Predictor
from clipmerge.evaluate.score import Score, Stopped, check_metric, is_better, read_result, score_of
from clipmerge.evaluate.setup import Given, Setup, read_head
from clipmerge.model import ModelSpec
from clipmerge.text import did_you_mean
from clipmerge.types import Bools, Ints, Progress
from clipmerge.weights.digest import content_digest
from clipmerge.weights.labels import names_of
from clipmerge.weights.weights import Source, Weights, as_weights, mean, open_all

__all__ = ["Evaluator", "score"]

_anonymous = count()
_explain_memory = out_of_memory_hint("use a smaller --batch-size")


class Evaluator:
    """Scores weights on splits with one model that stays in memory.

    Making one reads nothing. Weights are copied into the model in place; images are decoded once, to pixels
    on disk; a zero-shot head is built once for all weights with the same text tower. A score is paid for once: asked
    again for the same sum of the same checkpoints, it is remembered. Under torchrun each process scores its share of
    the images, and every process has the whole answer.

    Args:
        splits: name → split; a split alone is called "val".
        model: an open_clip name, a JSON configuration, a ModelSpec; None: what each of the weights records.
        device: "cpu", "cuda", "cuda:1" …; None: the GPU, where there is one (each process's own).
        precision: what the image tower computes in: "fp32", "tf32", or "bf16" or "fp16" by autocast; None: "bf16" on
            a GPU, "fp32" on a CPU. Weights, heads, logits and probabilities are fp32 or wider.
        batch_size: images at a time, at most; None: 256, on a GPU 512.
        templates: prompts for zero-shot heads, as `data.prompts.templates` takes them; None: what the weights record
            for these classes, else the split's own. A split that was opened with templates keeps them.
        heads: split → a checkpoint whose classification head scores it, in place of the weights' own.
        text_tower: the checkpoint whose text tower is taken by weights that have none.
        metric: the one that decides: a key of `metrics.METRICS`; None: "top1", and "recall@1" where a split has
            captions and no classes.
        cache: the folder for pixels and heads, None for the user's cache folder.
        journal: a file of scores already paid for, read and appended to, so that a killed search goes on from it.
            Under torchrun the first process's answers for all.
        on_progress: called as (what, done, total).
        predictor: what predicts in place of an open_clip model (in tests).

    Attributes:
        images_scored, images_saved: images through the model so far, and spared by stopping early and remembering.
    """

    def __init__(
        self,
        splits: Mapping[str, Split] | Split,
        model: ModelSpec | str | Path | None = None,
        *,
        device: str | torch.device | None = None,
        precision: str | None = None,
        batch_size: int | None = None,
        templates: str | Path | Sequence[str] | None = None,
        heads: Mapping[str, Source] | None = None,
        text_tower: Source | None = None,
        metric: str | None = None,
        cache: Path | None = None,
        journal: Journal | str | os.PathLike[str] | None = None,
        on_progress: Progress | None = None,
        predictor: Predictor | None = None,
    ) -> None:
        pair: tuple[Any, Any] = (splits, model)
        if isinstance(pair[1], Mapping | Split):  # (model, splits), the order of older versions
            model, splits = pair
        if not isinstance(splits, Mapping | Split):
            raise SelectionError(f"{splits!r} is no split", hint="Evaluator(cm.open_split(DATA), model=…)")
        self.splits: Mapping[str, Split] = dict(splits) if isinstance(splits, Mapping) else {"val": splits}
        self.metrics = {name: _metric_for(split, metric) for name, split in self.splits.items()}
        self.images_scored = 0
        self.images_saved = 0
        for name in heads or {}:
            self.split_name(name)
        self._given = Given(
            model,
            templates,
            {name: read_head(head) for name, head in (heads or {}).items()},
            None if text_tower is None else as_weights(text_tower),
        )
        if predictor is None:
            place = resolve_device(device)
            computed = resolve_precision(precision, place)
            predictor = Predictor(self._given, self.splits, place, computed, batch_size, cache, on_progress)
        self.predictor = predictor
        self._journal = journal if isinstance(journal, Journal) or journal is None else Journal(journal)
        self._loaded: Weights | None = None
        self._mean = ""
        self._results: dict[str, Score | Stopped] = {}
        self._difficulty: dict[str, _Difficulty] = {}
        self._digests: WeakKeyDictionary[Checkpoint, str] = WeakKeyDictionary()

    def __repr__(self) -> str:
        return (
            f"Evaluator({', '.join(f'{name}: {len(split)} images' for name, split in self.splits.items())})"
        )

    # -- scores -------------------------------------------------------------------------------------------

    def score(self, weights: Source, split: str | None = None) -> Score:
        """Compute every metric of weights on one split (the only one, or "val", where none is named)."""
        weights, name = self._given.complete(as_weights(weights)), self.split_name(split)
        key = self._key(weights, name)
        result = self._recall(key, name)
        if isinstance(result, Score):
            self.images_saved += self.splits[name].pictures
            return result
        self.load(weights)
        return cast("Score", self._remember(key, weights, name, self._run(name, weights)))

    def scores(self, weights: Source, splits: Sequence[str] | None = None) -> dict[str, Score]:
        """Score weights on several splits, by default on all; they are loaded once."""
        weights = self._given.complete(as_weights(weights))
        return {name: self.score(weights, name) for name in (self.splits if splits is None else splits)}

    @contextmanager
    def together(self, weights: Sequence[Weights]) -> Iterator[None]:
        """Inside the block, score all weights in one way, as a search must.

        The model, prompts and class names are those that all of `weights` agree on; one that records none takes the
        others'.

        Raises:
            ModelError, MismatchError: they record different models. SelectionError: they record different prompts.
        """
        with self.predictor.together([self._given.complete(each) for each in weights]):
            self._loaded, self._mean = None, ""
            try:
                yield
            finally:
                self._loaded, self._mean = None, ""

    def setup(self, weights: Source | None = None, split: str | None = None) -> Setup:
        """Say how weights, by default those that are loaded, are scored on a split: model, prompts, head."""
        complete = None if weights is None else self._given.complete(as_weights(weights))
        return self.predictor.setup(self.split_name(split), complete)

    def score_with(
        self,
        members: Sequence[Weights],
        candidate: Weights,
        split: str | None = None,
        *,
        incumbent: Score,
        strict: bool = False,
        early_stop: bool = True,
    ) -> Score | Stopped:
        """Score the mean of members and a candidate, stopping as soon as it cannot be better than the incumbent.

        The mean of the members is computed exactly and held beside the model; each candidate is one lerp per tensor
        from there, so that rounding never adds up and a resumed search computes what an unbroken one does. Images
        that were often wrong come first, so that a candidate that cannot win is known early.

        Args:
            incumbent: the score of the members' mean. strict: as in `is_better`.
            early_stop: the answer that matters, whether the candidate is better, is the same without.
        """
        name = self.split_name(split)
        proposed = self._given.complete(mean([*members, candidate]))
        key = self._key(proposed, name)
        known = self._recall(key, name)
        if isinstance(known, Score) or (known and not is_better(known, incumbent, strict=strict)):
            self.images_saved += self.splits[name].pictures
            return known
        held, candidate = self._given.complete(mean(members)), self._given.complete(candidate)
        if self._mean != (recipe := recipe_digest(held, self._digest)):
            self.load(held)
            self.predictor.resident.hold()
            self._mean = recipe
        self._loaded = None
        self.predictor.resident.lerp(candidate, 1 / (len(members) + 1))
        result = self._run(name, candidate, incumbent if early_stop else None, strict=strict)
        return self._remember(key, proposed, name, result)

    @_explain_memory
    def _run(
        self, name: str, candidate: Weights, incumbent: Score | None = None, *, strict: bool = False
    ) -> Score | Stopped:
        """Predict a split with what the model now holds, until all is seen or the incumbent is out of reach."""
        if METRICS[self.metrics[name]].retrieval:  # a rank hangs on all images, so each pass is a full one
            result = score_of(self.predictor.ranks(name), self.metrics[name])
            self.images_scored += result.images_scored
            return result
        split, difficulty = self.splits[name], self._difficulty_of(name)
        n, metric = len(split), METRICS[self.metrics[name]]
        may_stop = incumbent is not None and metric.higher_is_better
        # Images that were not seen count as right: no metric that may stop a pass falls when an image becomes right,
        # so what loses now would lose in full as well (README.md).
        best_case = Predictions(split.labels, split.labels.copy(), np.ones(n, bool), np.ones(n), split.groups)
        seen, stopped = np.zeros(n, bool), None
        order = difficulty.order() if may_stop else np.arange(n)
        try:
            for indices, rows in self.predictor.rows(name, order):
                best_case.predicted[indices] = rows[:, 0].astype(np.int64)
                best_case.in_top5[indices] = rows[:, 1] > 0
                best_case.confidence[indices] = rows[:, 2]
                seen[indices] = True
                if may_stop and not seen.all():
                    stopped = Stopped(self.metrics[name], metric.compute(best_case), n, int(seen.sum()))
                    if not is_better(stopped, incumbent, strict=strict):
                        break
        except NonFiniteError as error:
            raise NonFiniteError(f"with {candidate!r}, {error.message}", hint=error.hint) from error
        scored = int(seen.sum())
        self.images_scored += scored
        self.images_saved += n - scored
        difficulty.add(best_case.right, seen)
        return stopped if stopped is not None and scored < n else score_of(best_case, self.metrics[name])

    # -- what is remembered -------------------------------------------------------------------------------

    def data_key(self, split: str | None = None, weights: Weights | None = None) -> str:
        """Digest everything that a score depends on beside the weights."""
        name = self.split_name(split)
        retrieval = ["retrieval"] if METRICS[self.metrics[name]].retrieval else []
        return _digest([self.splits[name].digest, *self.predictor.key(name, weights), *retrieval])

    def _key(self, weights: Weights, name: str) -> str:
        """Name what a score is filed under: the recipe, and all that it depends on beside the weights."""
        if self._journal is None:
            data = _digest([name, *self.predictor.key(name, weights)])
        else:
            data = self.data_key(name, weights)
        return f"{recipe_digest(weights, self._digest)}:{data}"

    def _digest(self, checkpoint: Checkpoint) -> str:
        """Digest a checkpoint's content; without a journal nobody else will compare, and any name of its own does."""
        if checkpoint not in self._digests:
            alone = self._journal is None
            self._digests[checkpoint] = f"#{next(_anonymous)}" if alone else content_digest(checkpoint)
        return self._digests[checkpoint]

    def _recall(self, key: str, name: str) -> Score | Stopped | None:
        """Return what has been paid for under `key`."""
        if key not in self._results and self._journal is not None:
            record = distributed.broadcast_object(self._journal.get(key))
            result = None if record is None else read_result(record, self.metrics[name])
            images, retrieval = len(self.splits[name]), METRICS[self.metrics[name]].retrieval
            if result is not None and result.n == images + self.splits[name].pictures * retrieval:
                self._results[key] = result
                if isinstance(result, Score) and not retrieval:
                    self._difficulty_of(name).add(result.correct_mask, np.ones(result.n, bool))
        return self._results.get(key)

    def _remember(self, key: str, weights: Weights, name: str, result: Score | Stopped) -> Score | Stopped:
        if isinstance(result, Score):
            self._results[key] = Score(result.metric, result.metrics, result.interval, result.correct_mask)
        else:
            self._results[key] = Stopped(result.metric, result.at_most, result.n, 0)
        if self._journal is not None:
            record = result.to_json(mask=True) if isinstance(result, Score) else result.to_json()
            if distributed.is_first():
                self._journal.put(key, {"split": name, "weights": repr(weights), **record})
        return result

    # -- the model and the data ---------------------------------------------------------------------------

    @property
    def metric(self) -> str:
        """The metric that decides on the first split: on all of them, unless some have captions in place of classes."""
        return next(iter(self.metrics.values()))

    @property
    def model(self) -> ModelSpec:
        """The model of the weights that were scored last.

        Raises:
            ModelError: it was left to the weights, and none have been loaded yet.
        """
        return self.predictor.spec()

    @_explain_memory
    def load(self, weights: Source) -> None:
        """Copy weights into the resident model.

        Raises:
            ModelError: they do not fit it.
        """
        weights = self._given.complete(as_weights(weights))
        if self._loaded is not weights:
            self._loaded, self._mean = None, ""
            self.predictor.load(weights)
            self._loaded = weights

    def expect(self, order: Sequence[Weights]) -> None:
        """Say which weights will be scored, in this order: a GPU gets the next ones while it scores."""
        self.predictor.expect(order)

    @_explain_memory
    def logits(self, weights: Source, split: str | None = None) -> Tensor:
        """Return logits for every image, shape (n, classes), fp32 on the CPU; -inf where the data lacks a class."""
        self.load(weights)
        return self.predictor.collect(self.split_name(split), "logits")

    @_explain_memory
    def features(self, weights: Source, split: str | None = None) -> Tensor:
        """Return normalised image features for every image, shape (n, d), fp32 on the CPU."""
        self.load(weights)
        return self.predictor.collect(self.split_name(split), "features")

    def labels(self, split: str | None = None) -> Ints:
        """Return the true classes, shape (n,)."""
        return self.splits[self.split_name(split)].labels

    def split_name(self, split: str | None) -> str:
        """Return `split`; where it is None, the only split or the one called "val".

        Raises:
            SelectionError: there is no such split, or several and none was named.
        """
        if split is None and (len(self.splits) == 1 or "val" in self.splits):
            return "val" if "val" in self.splits else next(iter(self.splits))
        if split is None:
            raise SelectionError(f"say which split: {', '.join(self.splits)}")
        if split in self.splits:
            return split
        raise SelectionError(
            f"there is no split {split!r}; there are {', '.join(self.splits)}",
            hint=did_you_mean(split, self.splits, "give the evaluator a split of that name"),
        )

    def _difficulty_of(self, name: str) -> "_Difficulty":
        return self._difficulty.setdefault(name, _Difficulty(len(self.splits[name])))


def _metric_for(split: Split, metric: str | None) -> str:
    """Return the metric that decides on a split, which must allow it."""
    captioned = split.captions is not None
    usual = "recall@1" if captioned and not split.classes else "top1"
    return check_metric(metric or usual, grouped=split.groups is not None, captioned=captioned)


def _digest(parts: list[Any]) -> str:
    return blake3(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


class _Difficulty:
    """How often each image was wrong, and so the order in which a candidate that cannot win is known soonest."""

    def __init__(self, n: int) -> None:
        self._wrong = np.zeros(n)
        self._seen = np.zeros(n)

    def add(self, right: Bools, seen: Bools) -> None:
        """Count one pass."""
        self._wrong += seen & ~right
        self._seen += seen

    def order(self) -> Ints:
        """Return images, those that were most often wrong first; ties in their own order."""
        return np.argsort(-(self._wrong / np.maximum(self._seen, 1)), kind="stable")


def score(
    checkpoints: Source | Sequence[Source],
    data: str | Split | Mapping[str, str | Split],
    *,
    model: ModelSpec | str | Path | None = None,
    on_progress: Progress | None = None,
    **options: Any,
) -> dict[str, dict[str, Score]]:
    """Score checkpoints on labelled images: checkpoint → split → Score.

    Args:
        checkpoints: weights or paths; names are distinct whatever the files are called.
        data: images as `open_split` takes them, or a Split; several by name. One alone is called "val".
        model, options: as in `Evaluator`.
    """
    splits = {
        name: split if isinstance(split, Split) else open_split(split, role="test", on_progress=on_progress)
        for name, split in (data if isinstance(data, Mapping) else {"val": data}).items()
    }
    evaluator = Evaluator(splits, model, on_progress=on_progress, **options)
    sources = [checkpoints] if isinstance(checkpoints, Weights | str | os.PathLike) else checkpoints
    opened = open_all(sources)
    evaluator.expect(opened)
    return {name: evaluator.scores(w) for name, w in zip(names_of(opened), opened, strict=True)}
