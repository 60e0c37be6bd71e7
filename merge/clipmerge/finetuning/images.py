"""The images of a run, as pixels and as features, and training batches on the device before the step asks for them."""

import multiprocessing
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import tee
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from clipmerge.checkpoint.processors import for_open_clip
from clipmerge.data.pixels import pixels
from clipmerge.data.split import Split
from clipmerge.device import keep_on_device, to_device
from clipmerge.distributed import first_on_machine_first, gather, local_world, overlapping_share, share
from clipmerge.errors import DataError, TrainingError
from clipmerge.finetuning.augment import Augmentation, DeviceCrops, device_crops, parse_augmentation
from clipmerge.finetuning.batches import Batch
from clipmerge.finetuning.settings import Settings
from clipmerge.finetuning.towers import Towers, image_features
from clipmerge.types import Pixels, Progress

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["Images", "Loader", "check_images", "resident"]

FREE = 0.75
"""Share of a GPU's memory that cached pixels leave free: gradients, moments and activations are yet to come."""

PIECE = 32
"""Images that a worker makes at a time: few enough that little of the shared memory is taken by what waits."""


@dataclass(frozen=True)
class Images:
    """Training and held-out images of one model's size."""

    train: Split
    val: Split | None
    preprocess: Mapping[str, Any]
    device: torch.device
    settings: Settings
    on_progress: Progress | None = None

    @property
    def random(self) -> bool:
        """Whether an image looks different at each visit."""
        return self.settings.augment != "none"

    def plain(self) -> Pixels:
        """Return training images through the eval transform, uint8 (n, 3, H, W)."""
        return self._decode(self.train, self.preprocess)

    def held_out(self) -> Pixels:
        """Return held-out images through the eval transform."""
        assert self.val is not None
        return self._decode(self.val, self.preprocess)

    def _decode(self, split: Split, preprocess: Mapping[str, Any]) -> Pixels:
        return first_on_machine_first(lambda: pixels(split, preprocess, on_progress=self.on_progress))

    def features(self, towers: Towers, images: Pixels, what: str = "features") -> "Float[Tensor, 'images d']":
        """Return unit features of images, computed once, a share by each rank. All ranks call it."""
        own, _ = overlapping_share(len(images))
        at_once = min(self.settings.batch_size, 256)
        features = image_features(
            towers, images[own], self.device, at_once, what=what, on_progress=self.on_progress
        )
        shares = torch.split(gather(features), len(features))
        return torch.cat([share[overlapping_share(len(images), i)[1] :] for i, share in enumerate(shares)])

    def loader(self) -> "Loader":
        """Return what yields batches of training pixels."""
        settings, size = self.settings, self.preprocess["size"]
        loader = Loader(self.train, self.device, settings.seed, workers=settings.workers)
        if not self.random:
            loader.fixed = resident(self.plain(), self.device)
        elif settings.augment_on == "device":
            loader.crops = device_crops(settings.augment, self.preprocess)
            side = round(np.max(size) * 8 / 7)
            square = {**for_open_clip(self.preprocess), "size": side, "resize_mode": "shortest"}
            loader.fixed = resident(self._decode(self.train, square), self.device)
        else:
            loader.augment = parse_augmentation(settings.augment, self.preprocess)
        return loader


def resident(images: Pixels, device: torch.device) -> Pixels | Tensor:
    """Return the images on the GPU if it has ample room for them, else as they are."""
    kept = keep_on_device(images, device, free=FREE)
    return images if kept is None else kept


def check_images(settings: Settings, train: Split, held_out: Mapping[str, Split]) -> None:
    """Refuse images without what the method needs.

    Raises:
        TrainingError: the best checkpoint is asked for without held-out images.
        DataError: no images, no labels (captions do for contrastive training), or other classes held out.
    """

    def labelled(split: Split) -> bool:
        return bool(split.classes) and bool((split.labels >= 0).all())

    headless = settings.row.head is None or settings.frozen_head
    captioned = settings.row.head is None and train.captions is not None and not train.classes
    if settings.select == "best" and not held_out:
        raise TrainingError("nothing says which checkpoint is best", hint="give held-out images with --val")
    idle = [name for name in ("score_every", "select_by") if not held_out and getattr(settings, name)]
    if idle:
        option = f"--{idle[0].replace('_', '-')}"
        raise TrainingError(f"{option} does nothing without held-out images", hint="give some with --val")
    if train.parts and not headless:
        raise TrainingError(
            f"{settings.method} trains one head, and several sets have theirs",
            hint="train on several sets by flyp, or by ce under their zero-shot heads: --head frozen",
        )
    if not train.parts and settings.shares != "size":
        raise TrainingError(
            "--shares does nothing with one set of images", hint="name several: --train NAME=DATA"
        )
    if not len(train):
        raise DataError(f"{train.source} has no images", hint="check the part and the limit")
    if not captioned and not labelled(train):
        hint = f"{settings.method} needs a class for each image"
        raise DataError(f"{train.source} has images without a label", hint=hint)
    for val in held_out.values():
        if val.captions is not None and not val.classes:
            raise DataError(
                f"{val.source} has captions and no classes, by which finetuning scores held-out images",
                hint=f"leave it out, and score what is written: clipmerge evaluate FILE --data {val.source}",
            )
        if not (len(val) and labelled(val)):
            hint = "name another held-out split"
            raise DataError(f"{val.source} cannot score: it has no labelled images", hint=hint)
        if not headless and val.classes != train.classes:
            hint = "a trained head scores the classes that it was trained on, in their order"
            raise DataError(f"{val.source} has other classes than {train.source}", hint=hint)


Key: TypeAlias = tuple[int, int]
"""(epoch, item): with the run's seed, all that an image's pixels depend on."""


@dataclass
class _Pieces(Dataset[Tensor | Exception]):
    """Makes pixels of many images at a time, in a worker process or in this one."""

    split: Split
    seed: int
    augment: Augmentation | None
    fixed: Pixels | None

    def __getitems__(self, keys: list[Key]) -> Tensor | Exception:
        """Return the pixels, or what went wrong: raised in a worker, torch would bury it in a traceback's text."""
        try:
            if self.fixed is not None:
                return torch.from_numpy(self.fixed[[item for _, item in keys]])
            assert self.augment is not None
            rows = [self.augment(self.split.image(i), f"{self.seed}/{epoch}/{i}") for epoch, i in keys]
            return torch.from_numpy(np.stack(rows))
        except Exception as error:
            return error


@dataclass
class Loader:
    """uint8 pixels (batch, 3, H, W) of each batch's items on this rank, on the device.

    Order and pixels are a function of (seed, epoch, item): the same for any number of workers.

    Attributes:
        augment: makes pixels of an image at each visit; None takes them from `fixed`.
        fixed: (n, 3, H, W): an array, or a tensor on the device if it fits there.
        crops: what is still to be done on the device.
        workers: processes that decode and augment, None for what suits the device; 0 works in this process.
        waited: seconds that the training loop has spent waiting for pixels.
    """

    split: Split
    device: torch.device
    seed: int
    augment: Augmentation | None = None
    fixed: Pixels | Tensor | None = None
    crops: DeviceCrops | None = None
    workers: int | None = None
    waited: float = field(default=0.0, init=False)

    def __call__(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Tensor]]:
        """Yield each batch with its pixels."""
        ahead, batches = tee(batches)
        source = self._index(self.fixed, ahead) if isinstance(self.fixed, Tensor) else self._load(ahead)
        for batch in batches:
            began = perf_counter()
            pixels = next(source)
            self.waited += perf_counter() - began
            if self.crops is not None:
                items = batch.items[share(len(batch.items))].tolist()
                pixels = self.crops(pixels, [f"{self.seed}/{batch.epoch}/{i}" for i in items])
            yield batch, pixels

    def _index(self, fixed: Tensor, batches: Iterable[Batch]) -> Iterator[Tensor]:
        for batch in batches:
            yield fixed[to_device(batch.items[share(len(batch.items))], self.device)]

    def _load(self, batches: Iterable[Batch]) -> Iterator[Tensor]:
        """Yield pixels that workers make ahead.

        Workers are forked: that takes milliseconds, works in scripts without a `__main__` guard, and they never touch
        the GPU. The DataLoader's own generator keeps it from drawing from the global one, which dropout uses.
        """
        workers = _default_workers(self.device) if self.workers is None else self.workers
        forks = workers > 0 and "fork" in multiprocessing.get_all_start_methods()
        cuda = self.device.type == "cuda"

        def split_up(batch: Batch) -> list[list[Key]]:
            keys = [(batch.epoch, i) for i in batch.items[share(len(batch.items))].tolist()]
            size = PIECE if workers else len(keys)
            return [keys[start : start + size] for start in range(0, len(keys), size)]

        batches, ahead = tee(batches)
        fixed = self.fixed if isinstance(self.fixed, np.ndarray) else None
        with warnings.catch_warnings():
            # More workers than cores are the user's choice; Python 3.12 warns of any fork beside threads.
            warnings.simplefilter("ignore")
            loader = DataLoader(
                _Pieces(self.split, self.seed, self.augment, fixed),
                batch_sampler=(piece for batch in ahead for piece in split_up(batch)),
                collate_fn=_same,
                num_workers=workers,
                pin_memory=cuda,
                generator=torch.Generator(),
                multiprocessing_context="fork" if forks else None,
            )
            source = iter(loader)
        stream = torch.cuda.Stream(self.device) if cuda else None  # type: ignore[no-untyped-call]
        for batch in batches:
            pieces = [next(source) for _ in split_up(batch)]
            for piece in pieces:
                if isinstance(piece, Exception):
                    raise piece
            yield self._copy(pieces, stream)

    def _copy(self, pieces: list[Tensor], stream: "torch.cuda.Stream | None") -> Tensor:
        """Return the pieces as one batch; pinned ones are copied beside the kernels of the step before."""
        if stream is None:
            return pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        with torch.cuda.stream(stream):
            copied = torch.cat([piece.to(self.device, non_blocking=True) for piece in pieces])
        compute = torch.cuda.current_stream(self.device)
        compute.wait_stream(stream)
        copied.record_stream(compute)  # its memory is not given away before the step has read it
        return copied


def _same(piece: Any) -> Any:
    return piece


def _default_workers(device: torch.device) -> int:
    """Return one process a core beside a GPU, shared by this machine's ranks; beside training on the CPU none."""
    if device.type != "cuda":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(16, cores // local_world()))
