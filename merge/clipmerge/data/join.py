"""Several sets of images as one, for training on all of them under one list of classes."""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from clipmerge.data.prompts import templates
from clipmerge.data.split import Split
from clipmerge.data.stored import Stored
from clipmerge.errors import DataError

__all__ = ["JoinedImages", "join"]


@dataclass(frozen=True)
class JoinedImages:
    """Images of several splits, one after the other, each as its split shows it."""

    splits: tuple[Split, ...]
    ends: tuple[int, ...]

    def fetch(self, i: int) -> Stored:
        split, item = self._find(i)
        return split.read_bytes(item) or split.image(item)

    def stamp(self, i: int) -> str | None:
        split, item = self._find(i)
        stamp = split.images.stamp(int(split.index[item]))
        return stamp and f"{stamp}\0{', '.join(map(str, split.shifts))}"

    def _find(self, i: int) -> tuple[Split, int]:
        place = bisect_right(self.ends, i)
        return self.splits[place], i - (self.ends[place] - len(self.splits[place]))


def join(splits: Mapping[str, Split]) -> Split:
    """Join sets of images: their classes stand one after the other, each with the prompts of its own set.

    Classes of two sets that have the same name and the same templates are one class: no prompt could tell them apart.

    Args:
        splits: a name for each set, which its items' names then begin with.

    Raises:
        DataError: some have classes and some only captions.
    """
    parts = tuple(splits.values())
    captioned = [part.captions is not None and not part.classes for part in parts]
    if any(captioned) and not all(captioned):
        raise DataError(
            "images with captions and images with classes cannot be trained on together",
            hint="give the captioned ones classes, or train on one after the other",
        )
    places: dict[tuple[str, tuple[str, ...]], int] = {}
    labels = []
    for part in parts:
        own = templates(None, part)
        rows = np.array([places.setdefault((name, own), len(places)) for name in part.classes] or [-1])
        labels.append(np.where(part.labels < 0, -1, rows[part.labels]))
    total = sum(map(len, parts))
    return Split(
        source=" + ".join(splits),
        classes=tuple(name for name, _ in places),
        labels=np.concatenate(labels).astype(np.int64),
        names=tuple(f"{name}/{item}" for name, part in splits.items() for item in part.names),
        images=JoinedImages(parts, tuple(accumulate(map(len, parts)))),
        index=np.arange(total),
        captions=tuple(text for part in parts for text in part.captions or ()) if any(captioned) else None,
        class_templates=tuple(own for _, own in places),
        parts=parts,
    )
