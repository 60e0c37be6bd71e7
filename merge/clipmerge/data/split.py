"""A Split: labelled images, named the same on every machine."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from blake3 import blake3

from clipmerge.data.shifts import Shift
from clipmerge.data.stored import StoredImages, content_key, decode, refuse, survey
from clipmerge.types import Bytes, Ints

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8
    from PIL.Image import Image
    from torch import Tensor

__all__ = ["Split", "shared_images"]

_MOST_COMPARED = 100_000
"""Images of a set that are read only to find them in another set."""


@dataclass(frozen=True, eq=False)
class Split:
    """Labelled images, read one at a time, by several threads or in worker processes.

    Attributes:
        source: the DATA text that it came from.
        part: the part of the source that was taken ("train", "val", "test" …), "" where it has none.
        classes: every name of the head (ImageNet's 1000 for ImageNet-R); () where images have captions only.
        labels: (n,) indices into `classes`, also where `class_subset` is set; -1 where there is no label.
        names: unique item names that hold no absolute path.
        images, index: where the images lie, and (n,) which of them these are.
        shifts: what happens to each image after it was decoded, in order.
        groups: (n,) indices into `group_names`, None where the data has no groups.
        captions: one text per image, None where the data has none.
        class_subset: sorted indices into `classes` that the data covers; None means all. `covered` hides the
            logits of the others.
        counts_as: for each of `class_subset` the label that it counts as: ObjectNet's "alarm clock" is both
            "analog clock" and "digital clock" of ImageNet. None where each counts as itself.
        templates: prompt templates with `{}`: those given, or the data's own; None where it has none.
        words: what the data itself calls each of `classes`; () where it is not known, or just that.
        given: "templates" and "classes", where the user gave them: no checkpoint's own stand in for these.
        skipped: what `skip_bad` left out, "item: reason" each.
        stored_keys: (n, 32) digests of the images as they are stored, where they are known already.
        remarks: what was decided or noticed on opening that a user should know, a sentence each.
        parts: the sets that `join` made it of; () for a single one.
        class_templates: of joined sets the templates of each class.
    """

    source: str
    classes: tuple[str, ...]
    labels: Ints
    names: tuple[str, ...]
    images: StoredImages
    index: Ints
    shifts: tuple[Shift, ...] = ()
    groups: Ints | None = None
    group_names: tuple[str, ...] | None = None
    captions: tuple[str, ...] | None = None
    class_subset: Ints | None = None
    counts_as: Ints | None = None
    templates: tuple[str, ...] | None = None
    words: tuple[str, ...] = ()
    given: frozenset[str] = frozenset()
    skipped: tuple[str, ...] = ()
    stored_keys: Bytes | None = None
    part: str = ""
    remarks: tuple[str, ...] = ()
    parts: "tuple[Split, ...]" = ()
    class_templates: tuple[tuple[str, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        return f"Split({self.source!r}, {len(self)} images, {len(self.classes)} classes)"

    def __getstate__(self) -> dict[str, Any]:
        """Leave tensors behind when a worker process gets a copy: they may lie on a GPU."""
        return {name: value for name, value in self.__dict__.items() if name != "_columns"}

    def image(self, i: int, *, verify: bool = False) -> "Image":
        """Return image `i` in RGB; `verify` that it is still the one that `stored_keys` were made of."""
        stored = self.images.fetch(int(self.index[i]))
        if verify and self.stored_keys is not None and content_key(stored) != self.stored_keys[i].tobytes():
            raise ValueError("changed since it was opened")
        image = decode(stored)
        for shift in self.shifts:
            image = shift.apply(image, self.names[i])
        return image

    def read_bytes(self, i: int) -> bytes | None:
        """Return image `i` as it is stored (JPEG, PNG …), None where it is not stored encoded or is shifted."""
        stored = None if self.shifts else self.images.fetch(int(self.index[i]))
        return stored if isinstance(stored, bytes) else None

    def subset(self, indices: "Sequence[int] | npt.NDArray[np.integer]") -> "Split":
        """Return the images at `indices`, in that order; classes stay as they are."""
        index = np.asarray(indices, dtype=np.int64)
        return replace(
            self,
            labels=self.labels[index],
            names=tuple(self.names[i] for i in index),
            index=self.index[index],
            groups=None if self.groups is None else self.groups[index],
            captions=None if self.captions is None else tuple(self.captions[i] for i in index),
            stored_keys=None if self.stored_keys is None else self.stored_keys[index],
        )

    def covered(self, logits: "Float[Tensor, 'batch classes']") -> "Float[Tensor, 'batch classes']":
        """Return logits with -inf for classes that the data does not cover.

        A class that counts as another gives it its own logit where that is higher.
        """
        if self.class_subset is None:
            return logits
        import torch

        if logits.device not in self._columns:  # copied once: a copy for each batch would make the host wait
            target = self.class_subset if self.counts_as is None else self.counts_as
            with torch.inference_mode(False):  # a later call may need gradients
                columns = torch.from_numpy(np.stack([self.class_subset, target])).to(logits.device)
            self._columns[logits.device] = columns
        shown, target_columns = self._columns[logits.device]
        hidden = torch.full_like(logits, -torch.inf)
        return hidden.scatter_reduce_(1, target_columns.expand(len(logits), -1), logits[:, shown], "amax")

    @property
    def pictures(self) -> int:
        """Count the images: fewer than the items where some have several captions."""
        return len(np.unique(self.index))

    @property
    def choices(self) -> int:
        """Count the classes that an answer chooses between; with fewer than two, any model is right."""
        if self.class_subset is None:
            return len(self.classes)
        return len(np.unique(self.class_subset if self.counts_as is None else self.counts_as))

    @cached_property
    def _columns(self) -> dict[Any, "Tensor"]:
        return {}

    @cached_property
    def keys(self) -> "UInt8[Bytes, 'images 32']":
        """A digest of each image's content."""
        stored = self.stored_keys
        if stored is None:
            stored, reasons = survey(self.images, self.index)
            refuse(self.source, [f"{self.names[i]}: {reason}" for i, reason in reasons.items()])
        keys = [key.tobytes() for key in stored]
        for shift in self.shifts:
            keys = [shift.key(key, name) for key, name in zip(keys, self.names, strict=True)]
        return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32)

    @cached_property
    def duplicates(self) -> tuple[tuple[int, int], ...]:
        """List (item, the first item with the same content); an image's further captions are not counted."""
        first, seen, pairs = dict[bytes, int](), set[int](), list[tuple[int, int]]()
        for i, (key, stored) in enumerate(zip(self.keys, self.index.tolist(), strict=True)):
            further = self.captions is not None and stored in seen
            if not further and (original := first.setdefault(key.tobytes(), i)) != i:
                pairs.append((i, original))
            seen.add(stored)
        return tuple(pairs)

    @cached_property
    def digest(self) -> str:
        """A digest of names, labels, groups, captions, classes and images; no path or time enters it."""
        hasher = blake3(b"clipmerge split 1")
        scored = [None if a is None else a.tolist() for a in (self.class_subset, self.counts_as)]
        hasher.update(repr((self.classes, scored, self.names, self.captions, self.group_names)).encode())
        for numbers in (self.labels, self.groups):
            hasher.update(b"-" if numbers is None else numbers.astype("<i8").tobytes())
        return hasher.update(self.keys.tobytes()).hexdigest()


def shared_images(splits: Mapping[str, Split]) -> list[str]:
    """Say which sets have images of another set, a sentence for each pair: a score on those says little of others."""
    contents = {
        name: {key.tobytes() for key in split.keys}
        for name, split in splits.items()
        if len(splits) > 1 and (split.stored_keys is not None or len(split) <= _MOST_COMPARED)
    }
    pairs = ((one, other, len(contents[one] & contents[other])) for one, other in combinations(contents, 2))
    return [
        f"{count} of {other}'s {splits[other].pictures} images are in {one} too"
        for one, other, count in pairs
        if count
    ]
