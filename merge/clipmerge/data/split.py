"""A Split: labelled images, named the same on every machine."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from clipmerge.data.check import content_keys
from clipmerge.data.images import Images, Picked

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

Labels = npt.NDArray[np.int64]


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
