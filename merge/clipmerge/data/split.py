"""DATA text → Split: labelled images, named the same on every machine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from clipmerge.data.adapters import find
from clipmerge.data.check import Bad, content_keys, distinct, refuse, unreadable
from clipmerge.data.choose import fraction_of, held_out, limited
from clipmerge.data.classes import Names, resolve
from clipmerge.data.images import Images, Picked
from clipmerge.data.shifts import parse_shift, shifted
from clipmerge.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

Labels = npt.NDArray[np.int64]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, eq=False)
class Split:
    """Labelled images, read one at a time.

    Attributes:
        source: the DATA text that it came from.
        classes: every name of the head (ImageNet's 1000 for ImageNet-R); () where images have captions only.
        labels: (n,) indices into `classes`, also where `class_subset` is set; -1 where there is no label.
        names: unique item names that hold no absolute path.
        images: where the images lie.
        groups: (n,) indices into `group_names`, None where the data has no groups.
        captions: one text per image, None where the data has none.
        class_subset: sorted indices into `classes` that the data covers; None means all. `covered` hides the
            logits of the others.
        counts_as: for each of `class_subset` the label that it counts as: ObjectNet's "alarm clock" is both
            "analog clock" and "digital clock" of ImageNet. None where each counts as itself.
        templates: the data's own prompt templates with `{}`, None where it has none.
        skipped: what `skip_bad` left out, "item: reason" each.
    """

    source: str
    classes: tuple[str, ...]
    labels: Labels
    names: tuple[str, ...]
    images: Images
    groups: Labels | None = None
    group_names: tuple[str, ...] | None = None
    captions: tuple[str, ...] | None = None
    class_subset: Labels | None = None
    counts_as: Labels | None = None
    templates: tuple[str, ...] | None = None
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"Split({self.source!r}, {len(self)} images, {len(self.classes)} classes)"

    def image(self, i: int) -> "Image":
        """Image `i` in RGB. Several threads may ask at once."""
        return self.images.image(i)

    def read_bytes(self, i: int) -> bytes | None:
        """Image `i` as it is stored (JPEG, PNG …), None where it is not stored encoded or is shifted."""
        return self.images.read_bytes(i)

    def subset(self, indices: "Sequence[int] | npt.NDArray[np.integer]") -> "Split":
        """The images at `indices`, in that order; classes stay as they are."""
        index = np.asarray(indices, dtype=np.int64)
        return replace(
            self,
            labels=self.labels[index],
            names=tuple(self.names[i] for i in index),
            images=Picked(self.images, index),
            groups=None if self.groups is None else self.groups[index],
            captions=None if self.captions is None else tuple(self.captions[i] for i in index),
        )

    def covered(self, logits: "Tensor") -> "Tensor":
        """Logits (batch, classes) with -inf for classes that the data does not cover.

        A class that counts as another gives it its own logit where that is higher.
        """
        if self.class_subset is None:
            return logits
        import torch

        target = self.class_subset if self.counts_as is None else self.counts_as
        shown = torch.from_numpy(self.class_subset).to(logits.device)
        index = torch.from_numpy(target).to(logits.device).expand(len(logits), -1)
        hidden = torch.full_like(logits, -torch.inf)
        return hidden.scatter_reduce_(1, index, logits[:, shown], "amax")

    @cached_property
    def keys(self) -> npt.NDArray[np.uint8]:
        """(n, 32): a digest of each image's content."""
        return content_keys(self.images)

    @cached_property
    def digest(self) -> str:
        """A digest of names, labels, groups, captions, classes and images; no path or time enters it."""
        hasher = blake3(b"clipmerge split 1")
        scored = [None if a is None else a.tolist() for a in (self.class_subset, self.counts_as)]
        hasher.update(repr((self.classes, scored, self.names, self.captions, self.group_names)).encode())
        for numbers in (self.labels, self.groups):
            hasher.update(b"-" if numbers is None else numbers.astype("<i8").tobytes())
        return hasher.update(self.keys.tobytes()).hexdigest()


def open_split(
    source: str | Path,
    *,
    classnames: Names | None = None,
    role: str | None = None,
    holdout: str | float | None = None,
    keep: Literal["holdout", "rest"] = "holdout",
    limit: int | None = None,
    skip_bad: bool = False,
    on_progress: Progress | None = None,
) -> Split:
    """The images that a DATA text names: `SOURCE[#part][@shift[:value]]…`, as in `digits#test@rotate:20`.

    SOURCE is a folder of class folders, a `.csv` or `.tsv`, an `.npz`, a folder of WebDataset shards in
    CLIP_benchmark's layout, Parquet as Hugging Face stores images, `torchvision:CIFAR10:ROOT` or `digits`.

    Args:
        classnames: a file (one name a line, a JSON list, or a JSON object from the data's words to names),
            "imagenet", or the names themselves.
        role: the part to take where the text names none: "train", "val" or "test" (the default).
        holdout: "2%" or 0.02 of the items; a hash of the item's name decides which.
        keep: the held-out items, or the rest.
        limit: at most so many images, spread evenly over classes, by hash of the name inside a class.
        skip_bad: leave out what cannot be used instead of refusing it; decodes every image once to find out.
        on_progress: called as (what, done, total).

    Raises:
        DataError: no such data, or items that cannot be used; all of them are counted, ten are named.
    """
    text = str(source)
    place, part, shifts = parse_source(text)
    wanted = role or ("train" if holdout is not None else "test")
    found = find(place, part, wanted)
    resolved = resolve(found, classnames)
    split = Split(
        source=text,
        classes=resolved.classes,
        labels=resolved.labels,
        names=distinct(found.names),
        images=found.images,
        groups=None if found.groups is None else np.asarray(found.groups, np.int64),
        group_names=found.group_names,
        captions=None if found.captions is None else tuple(found.captions),
        class_subset=resolved.subset,
        counts_as=resolved.counts_as,
        templates=found.templates,
    )
    chosen = np.ones(len(split), bool) if holdout is None else held_out(found.names, fraction_of(holdout))
    if keep == "rest" and holdout is not None:
        chosen = ~chosen
    if found.labels is not None:
        chosen &= resolved.labels >= 0
    split = _usable(split.subset(np.flatnonzero(chosen)), resolved.bad, limit, skip_bad, on_progress)
    for shift in shifts:
        split = shifted(split, shift)
    return split


def _usable(
    split: Split, bad: list[Bad], limit: int | None, skip_bad: bool, on_progress: Progress | None
) -> Split:
    """The items that can be used, `limit` of them; one error for all that cannot, unless they are skipped."""
    if limit is not None and not skip_bad:
        split = limited(split, limit)
    broken = unreadable(split.images, split.names, fully=skip_bad, on_progress=on_progress)
    bad = [*bad, *broken.values()]
    if not skip_bad:
        refuse(split.source, bad)
    split = split.subset([i for i in range(len(split)) if i not in broken]) if broken else split
    split = replace(split, skipped=tuple(f"{b.item}: {b.reason}" for b in bad))
    if not len(split):
        hint = "ask for a larger part, or look at the data"
        raise DataError(f"{split.source}: no image is left to use", hint=hint)
    return split if limit is None else limited(split, limit)


def parse_source(text: str) -> tuple[str, str | None, list[str]]:
    """`SOURCE#part@shift@shift` → SOURCE, part or None, shifts; a path that exists is never cut."""
    place, shifts = text, list[str]()
    while not Path(place).exists():
        cut = max(place.rfind("#"), place.rfind("@"))
        if cut < 0 or "/" in place[cut:]:
            break
        place, sign, word = place[:cut], place[cut], place[cut + 1 :]
        if sign == "#":
            return place, word, shifts
        parse_shift(word)
        shifts.insert(0, word)
    return place, None, shifts
