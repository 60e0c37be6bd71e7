"""Images through the resident model: batches in any order, shared between processes, read back one batch late."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clipmerge import distributed
from clipmerge.checkpoint.cache import cache_dir
from clipmerge.data.pixels import pixels
from clipmerge.data.split import Split
from clipmerge.device import Precision, autocast, autocast_dtype, float32_matmul
from clipmerge.errors import DataError, ModelError, NonFiniteError
from clipmerge.evaluate.device_split import DeviceSplit
from clipmerge.evaluate.heads import class_logits, encode_prompts, zero_shot_head
from clipmerge.evaluate.resident import Resident
from clipmerge.evaluate.retrieval import Ranks, rank_pairs
from clipmerge.evaluate.setup import HEAD, Given, Setup
from clipmerge.model import ModelSpec, get_tokenizer
from clipmerge.types import Floats, Ints, Progress
from clipmerge.weights.digest import content_digest
from clipmerge.weights.weights import Weights

_PASSES, _LEAST = 16, 32
"""A small split is still cut into so many batches of so many images, so that a pass has somewhere to stop."""

_LATE = ("cuda",)
"""Devices that compute while the host goes on: their rows are read one batch late."""

T = TypeVar("T")

Arrive = Callable[[], Tensor]
"""Waits until rows have come from the device, and returns them on the CPU."""

Head = tuple[Tensor | nn.Module | None, Tensor | None]
"""A zero-shot head, or a trained one (None: the weights' own) and which of its rows."""

Reduce = Callable[[Tensor, Tensor], Tensor]
"""(indices, uint8 pixels) → rows (batch, columns), whose last column marks images that are not finite."""


@dataclass(eq=False)
class Predictor:
    """An open_clip model on its device, and splits for it to predict.

    Pixels are decoded once, to disk; a zero-shot head is built once for all weights with the same text tower.

    Attributes: as the arguments of `Evaluator`, with device and precision resolved; `given` decides how each is scored.
    """

    given: Given
    splits: Mapping[str, Split]
    device: torch.device
    precision: Precision
    batch_size: int | None
    cache: Path | None
    on_progress: Progress | None
    _resident: Resident | None = None
    _spec: ModelSpec | None = None
    _weights: Weights | None = None
    _agreed: tuple[Weights, ...] = ()
    _setups: tuple[Weights | None, dict[str, Setup]] = (None, {})
    _tokenizer: Callable[[list[str]], Tensor] | None = None
    _on_device: dict[str, tuple[Mapping[str, Any], DeviceSplit]] = field(default_factory=dict)
    _heads: dict[str, tuple[list[Any], Tensor]] = field(default_factory=dict)
    _file_heads: dict[str, nn.Module] = field(default_factory=dict)

    # -- the model and the data ---------------------------------------------------------------------------

    def spec(self) -> ModelSpec:
        """Return the model of the weights that are loaded; before any are, the one that was given or agreed on.

        None are loaded where every score was remembered.
        """
        return self._spec or self.given.spec(self._agreed)

    def setup(self, split: str, weights: Weights | None = None) -> Setup:
        """Decide how weights, by default those that are loaded, are scored on a split.

        Where several were said to be `together`, all of them are scored alike.
        """
        weights = weights or self._weights
        among = self._agreed or (() if weights is None else (weights,))
        if not among:
            raise ModelError("no weights are loaded", hint="call load(weights) first")
        if self._setups[0] is not among[-1]:
            self._setups = (among[-1], {})
        known = self._setups[1]
        if split not in known:
            known[split] = self.given.setup(among, split, self.splits[split])
        return known[split]

    @contextmanager
    def together(self, weights: Sequence[Weights]) -> Iterator[None]:
        """Inside the block, score all weights by what these agree on; refuse those that do not."""
        before = self._agreed
        held = {checkpoint for each in before for checkpoint in each.checkpoints}
        self._agreed = (*before, *(each for each in weights if not held.issuperset(each.checkpoints)))
        self._setups = (None, {})
        try:
            yield
        finally:
            self._agreed, self._setups = before, (None, {})

    @property
    def resident(self) -> Resident:
        """The model that stays.

        Raises:
            ModelError: nothing has been loaded yet.
        """
        if self._resident is None:
            raise ModelError("no weights are loaded", hint="call load(weights) first")
        return self._resident

    def load(self, weights: Weights) -> None:
        """Copy weights into the model, into another one where they are for another."""
        self._resident_for(weights).load(weights)
        self._weights = weights

    def expect(self, order: Sequence[Weights]) -> None:
        """Say which weights will be scored, in this order: a GPU gets the next ones while it scores."""
        if order and self.device.type != "cpu":
            self._resident_for(order[0]).checkpoints.expect(order)

    def _resident_for(self, weights: Weights) -> Resident:
        spec = self.given.spec(self._agreed or (weights,))
        if self._resident is None or self._spec is None or not _same_model(spec, self._spec):
            self._resident, self._tokenizer, self._heads = None, None, {}
            self._resident = Resident(spec, self.device)
        self._spec = spec
        return self._resident

    def key(self, split: str, weights: Weights | None = None) -> list[Any]:
        """Return what predictions on a split depend on beside images and weights, ready for `json.dumps`.

        A GPU's rounding is not a CPU's, so the kind of device counts; a precision alone means on a CPU.
        """
        kind = self.device.type
        computed = self.precision if kind == "cpu" else f"{self.precision} on {kind}"
        setup = self.setup(split, weights)
        more = setup.exceptions()
        if setup.head == "file":
            more["head"] = content_digest(self.given.heads[split].checkpoints[0])
        return [setup.spec.to_metadata(), setup.templates, computed, *([more] if more else [])]

    def device_split(self, name: str) -> DeviceSplit:
        """Return a split as the device sees it; its images are decoded once on each machine."""
        split, preprocess = self.splits[name], self.spec().preprocess
        if name not in self._on_device or self._on_device[name][0] != preprocess:
            self._on_device.pop(name, None)  # a GPU need not hold both
            decoded = distributed.first_on_machine_first(
                lambda: pixels(split, preprocess, cache=self.cache, on_progress=self.on_progress)
            )
            self._on_device[name] = (preprocess, DeviceSplit(split, decoded, preprocess, self.device))
        return self._on_device[name][1]

    def head(self, name: str) -> Head:
        """Return what `class_logits` takes to score a split."""
        setup = self.setup(name)
        rows = None if setup.rows is None else torch.from_numpy(setup.rows).to(self.device)
        if setup.head == "captions":
            source = self.splits[name].source
            hint = "--metric recall@1 scores it; learned soups, ensembles and AdaMerging need classes"
            raise DataError(f"{source} has captions and no classes", hint=hint)
        if setup.head == "trained":
            return None, rows
        if setup.head == "file":
            return self._file_head(name), rows
        digest = self.resident.text_digest()
        made_of = [digest, setup.classes, setup.templates]
        if name not in self._heads or self._heads[name][0] != made_of:
            self._tokenizer = self._tokenizer or get_tokenizer(self.spec())
            head = zero_shot_head(
                self.resident.module,
                self._tokenizer,
                setup.classes,
                setup.templates,
                cache=self.cache or cache_dir(),
                digest=digest,
                on_progress=self.on_progress,
            )
            self._heads[name] = (made_of, head)
        return self._heads[name][1], None

    def _file_head(self, name: str) -> nn.Module:
        """Read the head that was given for a split, on the device."""
        if name not in self._file_heads:
            tensors = self.given.heads[name].state_dict("F32")
            weight, bias = (tensors.get(f"{HEAD}.{part}") for part in ("weight", "bias"))
            assert weight is not None
            head = nn.Linear(weight.shape[1], len(weight), bias=bias is not None, device=self.device)
            head.requires_grad_(False)
            head.weight.copy_(weight)
            if bias is not None:
                head.bias.copy_(bias)
            self._file_heads[name] = head
        return self._file_heads[name]

    # -- one batch ----------------------------------------------------------------------------------------

    def rows(self, split: str, order: Ints) -> Iterator[tuple[Ints, Floats]]:
        """Yield (images, their rows: predicted class, whether the true one is in the top five, confidence)."""
        if (self.splits[split].labels < 0).any():
            wanted = (
                "score captions by --metric recall@1" if self.splits[split].captions else "name its classes"
            )
            raise DataError(f"{self.splits[split].source} has images without a class", hint=wanted)
        images, head = self.device_split(split), self.head(split)

        def reduce(indices: Tensor, batch: Tensor) -> Tensor:
            raw = self._logits(images, batch, head)
            logits = images.covered(raw).to(_wide(self.device))
            true = logits.gather(1, images.labels[indices][:, None])
            in_top5 = (logits > true).sum(dim=-1) < 5
            confidence = logits.softmax(dim=-1).amax(dim=-1)
            columns = (logits.argmax(dim=-1), in_top5, confidence, _not_finite(raw))
            return torch.stack([column.to(confidence) for column in columns], dim=-1)

        for chunk, rows in self._chunks(split, order, reduce, 4):
            yield chunk, rows.numpy()

    def collect(self, split: str, what: Literal["logits", "features"]) -> Tensor:
        """Return logits (-inf for classes that the data lacks) or unit features of every image, fp32 on the CPU."""
        images = self.device_split(split)
        head: Head = (None, None)
        if what == "features":
            width = _feature_width(self.resident.module, images)
        else:
            head, width = self.head(split), len(self.splits[split].classes)

        def reduce(indices: Tensor, batch: Tensor) -> Tensor:
            if what == "features":
                raw = values = self._features(images, batch)
            else:
                raw = self._logits(images, batch, head)
                values = images.covered(raw)
            return torch.cat([values, _not_finite(raw)[:, None].to(values)], dim=-1)

        collected = torch.empty(len(self.splits[split]), width)
        for chunk, rows in self._chunks(split, np.arange(len(collected)), reduce, width + 1):
            collected[torch.from_numpy(chunk)] = rows[:, :-1].float()
        return collected

    def ranks(self, name: str) -> Ranks:
        """Rank captions for every image of a split, and images for every caption; equal captions are encoded once."""
        split, images = self.splits[name], f"{name} (images)"
        _, first, image_of = np.unique(split.index, return_index=True, return_inverse=True)
        if images not in self.splits:
            self.splits = {**self.splits, images: split.subset(first)}
        self._tokenizer = self._tokenizer or get_tokenizer(self.spec())
        tokens, text_of = torch.unique(
            self._tokenizer(list(split.captions or ())), dim=0, return_inverse=True
        )
        digest, module = self.resident.text_digest(), self.resident.module
        if self._heads.get(images, ([],))[0] != [digest]:
            encoded = encode_prompts(module, tokens, on_progress=self.on_progress)
            if not encoded.isfinite().all():
                hint = "the text tower's weights hold NaN or infinity"
                raise NonFiniteError(f"the model's features of {name}'s captions are not finite", hint=hint)
            self._heads[images] = ([digest], encoded)
        features, wide = self.collect(images, "features"), _wide(self.device)
        return rank_pairs(
            features.to(self.device, wide),
            self._heads[images][1].to(wide),
            text_of.to(self.device),
            torch.from_numpy(image_of).to(self.device),
        )

    def _features(self, images: DeviceSplit, batch: Tensor) -> Tensor:
        ready, dtype = images.normalise(batch), autocast_dtype(self.precision)
        lowered: Any = self.resident.lowered(dtype)
        if lowered is not None:
            features = lowered.encode_image(ready.to(dtype), normalize=False)
        else:
            with autocast(self.precision, self.device):
                features = cast("Any", self.resident.module).encode_image(ready, normalize=False)
        return F.normalize(features.float(), dim=-1)

    def _logits(self, images: DeviceSplit, batch: Tensor, head: Head) -> Tensor:
        return class_logits(self.resident.module, self._features(images, batch), *head)

    # -- all batches --------------------------------------------------------------------------------------

    def _chunks(self, split: str, order: Ints, reduce: Reduce, width: int) -> Iterator[tuple[Ints, Tensor]]:
        """Yield (images, rows for them), the same in every process.

        A GPU is never waited for while it could work: a chunk's rows are looked at after the next chunk has been
        launched. Which images are not finite is a column of the summed rows, so that all processes raise together.

        Raises:
            NonFiniteError: logits or features are not finite.
        """
        launched = self._launch(split, order, reduce, width)
        done = 0
        for chunk, arrive in _one_late(launched) if self.device.type in _LATE else launched:
            rows = arrive()
            if rows[:, -1].any():
                raise NonFiniteError(
                    f"the model's logits for {split} are not finite",
                    hint="the weights hold NaN or infinity, or --precision fp16 overflows: try bf16 or fp32",
                )
            yield chunk, rows
            done += len(chunk)
            if self.on_progress:
                self.on_progress(f"scoring {split}", done, len(order))

    def _launch(self, split: str, order: Ints, reduce: Reduce, width: int) -> Iterator[tuple[Ints, Arrive]]:
        """Yield (images, what waits for their rows and returns them), each process computing its share."""
        n, size = len(order), _images_at_once(len(order), self.batch_size, self.device)
        rank, step = distributed.rank(), size * distributed.world()
        starts = range(0, n, step)
        spans = [(min(s + rank * size, n), min(s + (rank + 1) * size, n)) for s in starts]
        batches = self.device_split(split).batches(order, spans)
        for start, (first, last) in zip(starts, spans, strict=True):
            chunk = order[start : start + step]
            # These must not be around the yield, where they would hold for whoever asks.
            with torch.inference_mode(), float32_matmul(self.precision):
                indices, batch = next(batches)
                rows = torch.zeros(len(chunk), width, dtype=_wide(self.device), device=self.device)
                if last > first:
                    rows[first - start : last - start] = reduce(indices, batch).to(rows)
                arrive = _fetch(distributed.all_reduce_sum(rows))
            yield chunk, arrive


def _same_model(one: ModelSpec, other: ModelSpec) -> bool:
    """Return whether one module serves both: pictures may be prepared differently, prompts are tokenized alike."""
    return one.name == other.name and one.config == other.config


def _one_late(launched: Iterator[T]) -> Iterator[T]:
    """Yield each item after the next one has been made."""
    return (item for item, _ in pairwise(chain(launched, [None])) if item is not None)


def _fetch(rows: Tensor) -> Arrive:
    """Start to copy rows from the device; what is returned waits for them."""
    if rows.device.type != "cuda":
        return rows.cpu
    host = torch.empty(rows.shape, dtype=rows.dtype, pin_memory=True)
    host.copy_(rows, non_blocking=True)
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record()

    def arrive() -> Tensor:
        copied.synchronize()
        return host

    return arrive


def _not_finite(values: Tensor) -> Tensor:
    return ~values.isfinite().all(dim=-1)


def _images_at_once(n: int, at_most: int | None, device: torch.device) -> int:
    """Return the size of a batch. A CPU gains nothing from large ones, a search gains from places to stop.

    Launching a batch's kernels takes the host as long for few images as for many, and a GPU waits meanwhile.
    """
    if device.type == "cpu":
        return min(at_most or 256, max(_LEAST, -(-n // _PASSES)))
    return at_most or (512 if device.type == "cuda" else 256)


def _wide(device: torch.device) -> torch.dtype:
    """Return fp64, where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def _feature_width(module: nn.Module, images: DeviceSplit) -> int:
    """Return the width of the image features."""
    model = cast("Any", module)
    width = getattr(model.visual, "output_dim", None)
    if isinstance(width, int):
        return width
    with torch.inference_mode():
        image = torch.zeros(1, *images.pixels.shape[1:], device=images.labels.device)
        return int(model.encode_image(image).shape[-1])
