"""The Evaluator: one resident model that scores weights on splits."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3
from torch import Tensor

from clipmerge import distributed
from clipmerge.checkpoint.cache import cache_dir
from clipmerge.data.pixels import pixels
from clipmerge.data.prompts import templates as resolve_templates
from clipmerge.device import resolve_device
from clipmerge.errors import DataError, ModelError, SelectionError
from clipmerge.evaluate.forward import Forward, Head
from clipmerge.evaluate.heads import zero_shot_head
from clipmerge.evaluate.resident import Resident
from clipmerge.evaluate.score import Score, check_metric, score_of
from clipmerge.evaluate.trial import Outcome, Trial
from clipmerge.model import ModelSpec, get_tokenizer, resolve_model
from clipmerge.text import nearest
from clipmerge.types import Progress

if TYPE_CHECKING:
    from clipmerge.data.split import Split
    from clipmerge.weights.weights import Weights

__all__ = ["Evaluator", "Outcome", "Score", "Trial"]


class Evaluator:
    """Scores weights on splits with one model that stays in memory.

    Making one reads nothing. Weights are copied into the model in place; images are decoded once, to pixels
    on disk; a zero-shot head is built once for all weights with the same text tower. Under torchrun each
    process scores its share of the images, and every process has the whole answer.

    Args:
        model: an open_clip name, a JSON configuration, a ModelSpec; None: what the first weights record.
        splits: name → split; a split alone is called "val".
        device: "cpu", "cuda", "cuda:1" …; None: the GPU, where there is one (each process's own).
        precision: "fp32", or "bf16" or "fp16" for autocast in the image tower. Weights and heads stay fp32.
        batch_size: images at a time, at most.
        templates: prompts for zero-shot heads, as `data.prompts.templates` takes them; None: the split's own.
        metric: the one that decides: a key of `metrics.METRICS`.
        cache: the folder for pixels and heads, None for the user's cache folder.
        on_progress: called as (what, done, total).

    Attributes:
        images_scored, images_saved: images through the model so far, and spared by stopping early.
    """

    def __init__(
        self,
        model: "ModelSpec | str | Path | None",
        splits: "Mapping[str, Split] | Split",
        *,
        device: str | None = None,
        precision: str = "fp32",
        batch_size: int = 256,
        templates: str | Path | Sequence[str] | None = None,
        metric: str = "top1",
        cache: Path | None = None,
        on_progress: Progress | None = None,
    ) -> None:
        self.splits: Mapping[str, Split] = dict(splits) if isinstance(splits, Mapping) else {"val": splits}
        grouped = all(split.groups is not None for split in self.splits.values())
        self.metric = check_metric(metric, grouped=grouped)
        self.device = str(resolve_device(device))
        self.precision = check_precision(precision)
        self.batch_size = batch_size
        self.images_scored = 0
        self.images_saved = 0
        self._asked = model
        self._spec: ModelSpec | None = None
        self._resident: Resident | None = None
        self._loaded: Weights | None = None
        self._templates = templates
        self._cache = cache
        self._progress = on_progress
        self._pixels: dict[str, npt.NDArray[np.uint8]] = {}
        self._heads: dict[tuple[str, str], Head] = {}
        self._tokenizer: Any = None

    # -- what is scored -----------------------------------------------------------------------------------

    @property
    def model(self) -> ModelSpec:
        """The model that scores.

        Raises:
            ModelError: it was left to the weights, and none have been loaded yet.
        """
        if self._spec is None:
            self._spec = resolve_model(self._asked)
        return self._spec

    def load(self, weights: "Weights") -> None:
        """Copy weights into the resident model.

        Raises:
            ModelError: they do not fit it.
        """
        if self._loaded is weights:
            return
        if self._spec is None:
            self._spec = resolve_model(self._asked, weights)
        if self._resident is None:
            self._resident = Resident(self.model, self.device)
        self._loaded = None
        self._resident.load(weights)
        self._loaded = weights

    def score(self, weights: "Weights", split: str | None = None) -> Score:
        """Every metric of the weights on one split (the only one, where none is named)."""
        name = self.split_name(split)
        self.load(weights)
        return self.score_resident(name)

    def scores(self, weights: "Weights") -> dict[str, Score]:
        """The weights' score on every split; they are loaded once."""
        return {name: self.score(weights, name) for name in self.splits}

    def logits(self, weights: "Weights", split: str | None = None) -> Tensor:
        """Logits for every image, shape (n, classes), fp32 on the CPU; -inf where the data lacks a class."""
        name = self.split_name(split)
        self.load(weights)
        return self._forward(name).collect("logits")

    def features(self, weights: "Weights", split: str | None = None) -> Tensor:
        """Normalised image features for every image, shape (n, d), fp32 on the CPU."""
        name = self.split_name(split)
        self.load(weights)
        return self._forward(name, headless=True).collect("features")

    def trial(self, split: str | None = None, strict: bool = False) -> Trial:
        """A running mean in the resident model, against which candidates are tried (greedy soups)."""
        return Trial(self, self.split_name(split), strict=strict)

    # -- what scores depend on ----------------------------------------------------------------------------

    def labels(self, split: str | None = None) -> npt.NDArray[np.int64]:
        """The true classes, shape (n,)."""
        return self.splits[self.split_name(split)].labels

    def pixels(self, split: str | None = None) -> npt.NDArray[np.uint8]:
        """The images as the model sees them before normalisation, shape (n, 3, H, W), decoded once."""
        return self._pixels_of(self.split_name(split))

    def templates(self, split: str | None = None) -> tuple[str, ...]:
        """The prompt templates that make this split's zero-shot heads."""
        return resolve_templates(self._templates, self.splits[self.split_name(split)])

    def data_key(self, split: str | None = None) -> str:
        """A digest of everything that a score depends on beside the weights."""
        name = self.split_name(split)
        parts = [self.splits[name].digest, self.model.to_metadata(), self.templates(name), self.precision]
        return blake3(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]

    def split_name(self, split: str | None) -> str:
        """`split`, or the only one where None.

        Raises:
            SelectionError: there is no such split, or several and none was named.
        """
        if split is None and len(self.splits) == 1:
            return next(iter(self.splits))
        if split is not None and split in self.splits:
            return split
        close = nearest(split or "", self.splits)
        raise SelectionError(
            f"there is no split {split!r}; there are {', '.join(self.splits)}"
            if split is not None
            else f"say which split: {', '.join(self.splits)}",
            hint=f"did you mean {close}?" if close else None,
        )

    # -- used by Trial ------------------------------------------------------------------------------------

    @property
    def resident(self) -> Resident:
        """The model that stays.

        Raises:
            ModelError: nothing has been loaded yet.
        """
        if self._resident is None:
            raise ModelError("no weights are loaded", hint="call load(weights) first")
        return self._resident

    def score_resident(self, name: str) -> Score:
        """The score of what the model now holds: a full pass."""
        partial = self.run(name)
        return score_of(partial.predictions, self.metric)

    def run(self, name: str, **options: Any) -> Any:
        """A pass over a split with what the model now holds; options as `Forward.predict` takes them."""
        partial = self._forward(name).predict(**options)
        self.images_scored += partial.seen
        self.images_saved += len(partial.judged) - partial.seen
        return partial

    def forget_loaded(self) -> None:
        """The model no longer holds what was last loaded."""
        self._loaded = None

    def _forward(self, name: str, *, headless: bool = False) -> Forward:
        split = self.splits[name]
        if (split.labels < 0).any() and not headless:
            raise DataError(
                f"{split.source} has images without a class", hint="scoring needs a label for each image"
            )
        return Forward(
            self.resident,
            self._pixels_of(name),
            split,
            None if headless else self._head(name),
            self.model.preprocess,
            self.precision,
            self.batch_size,
            name,
            self._progress,
        )

    def _pixels_of(self, name: str) -> npt.NDArray[np.uint8]:
        if name not in self._pixels:
            self._pixels[name] = distributed.first_on_machine_first(
                lambda: pixels(
                    self.splits[name], self.model.preprocess, cache=self._cache, on_progress=self._progress
                )
            )
        return self._pixels[name]

    def _head(self, name: str) -> Head:
        split = self.splits[name]
        trained = Head.trained(self.resident.module)
        if trained is not None:
            if len(trained.weight) != len(split.classes):
                raise ModelError(
                    f"the head has {len(trained.weight)} classes, {split.source} has {len(split.classes)}",
                    hint="score it on the data that the head was trained for",
                )
            return trained
        key = (name, self.resident.text_digest())
        if key not in self._heads:
            self._heads = {k: v for k, v in self._heads.items() if k[0] != name}
            self._heads[key] = Head(self._zero_shot(name, key[1]), None, zero_shot=True)
        return self._heads[key]

    def _zero_shot(self, name: str, digest: str) -> Tensor:
        if self._tokenizer is None:
            self._tokenizer = get_tokenizer(self.model)
        return zero_shot_head(
            self.resident.module,
            self._tokenizer,
            self.splits[name].classes,
            self.templates(name),
            cache=self._cache or cache_dir(),
            digest=digest,
            on_progress=self._progress,
        )


def check_precision(precision: str) -> str:
    """`precision`, where it is one that exists."""
    if precision not in ("fp32", "bf16", "fp16"):
        raise SelectionError(f"there is no precision {precision!r}", hint="use fp32, bf16 or fp16")
    return precision
