"""Read an .npz of labels and images, decoded or encoded."""

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from clipmerge.data.raw_split import Pick, RawSplit
from clipmerge.data.stored import ArrayImages, Stored, file_stamp
from clipmerge.errors import DataError
from clipmerge.types import Ints

__all__ = ["npz"]

Arrays = Mapping[str, npt.NDArray[Any]]

_NAMES = frozenset({"labels", "images", "blob", "offsets", "split", "classes", "groups", "group_names"})
_HINT = (
    "an .npz holds labels (n), split (n; 0 train, 1 val, 2 test), classes, and images (n, H, W) or "
    "(n, H, W, 3) in uint8, or blob (uint8) with offsets (n + 1) of encoded images"
)


@dataclass(frozen=True)
class NpzImages:
    """The images of an .npz. A worker process reads the file again instead of getting a copy of the arrays."""

    path: str
    images: ArrayImages

    def __reduce__(self) -> tuple[Any, ...]:
        return _images, (self.path,)

    def fetch(self, i: int) -> Stored:
        return self.images.fetch(i)

    def stamp(self, i: int) -> str:
        return f"{file_stamp(self.path)}\0{i}"


def npz(place: str, pick: Pick) -> RawSplit:
    """Read an .npz: `labels`, and `images` or `blob` with `offsets`; maybe `split`, `classes`, `groups`."""
    arrays = _load(place)
    images, labels = _images(place, arrays), arrays["labels"]
    wrong = [key for key in ("split", "groups") if key in arrays and arrays[key].shape != labels.shape]
    if wrong or not _fit(arrays):
        shapes = ", ".join(f"{key} {array.dtype} {array.shape}" for key, array in arrays.items())
        length = f"{', '.join(wrong)} of another length; " if wrong else ""
        raise DataError(f"{place}: its arrays do not fit together ({length}{shapes})", hint=_HINT)
    index = _part(arrays.get("split"), len(labels), pick)
    classes = arrays.get("classes")
    if classes is None and labels.dtype.kind == "U":
        classes = np.unique(labels)
    return RawSplit(
        images,
        [f"{i:06d}" for i in index],
        labels[index].tolist() if labels.dtype.kind == "U" else labels[index].astype(np.int64),
        None if classes is None else tuple(map(str, classes)),
        index,
        all_labels=np.unique(labels).tolist(),
        groups=arrays["groups"].astype(np.int64)[index] if "groups" in arrays else None,
        group_names=tuple(map(str, arrays["group_names"])) if "group_names" in arrays else None,
    )


def _load(path: str) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files if key in _NAMES}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as .npz: {error}", hint=_HINT) from error
    if "labels" not in arrays or not ("images" in arrays or {"blob", "offsets"} <= arrays.keys()):
        raise DataError(f"{path} has no labels, or no images", hint=_HINT)
    return arrays


def _images(path: str, arrays: Arrays | None = None) -> NpzImages:
    arrays = arrays or _load(path)
    offsets = None if "images" in arrays else arrays["offsets"].astype(np.int64)
    return NpzImages(path, ArrayImages(arrays["blob"] if offsets is not None else arrays["images"], offsets))


def _fit(arrays: Arrays) -> bool:
    """Return whether labels and images have the dtypes and shapes that they should have."""
    labels, data = arrays["labels"], arrays["images"] if "images" in arrays else arrays["blob"]
    if labels.dtype.kind not in "iuU" or labels.ndim != 1 or data.dtype != np.uint8:
        return False
    if "images" in arrays:
        return len(data) == len(labels) and (data.ndim == 3 or (data.ndim == 4 and data.shape[3] == 3))
    offsets = arrays["offsets"].astype(np.int64)
    rising = bool((np.diff(offsets, prepend=0, append=len(data)) >= 0).all())
    return len(offsets) == len(labels) + 1 and rising


def _part(numbers: npt.NDArray[Any] | None, count: int, pick: Pick) -> Ints:
    """Return which items are of the part: by name, or by number (0 train, 1 val, 2 test)."""
    if numbers is None:
        pick([""])
        return np.arange(count)
    values = np.unique(numbers)
    known = {0: "train", 1: "val", 2: "test"}
    names = [known.get(value, str(value)) for value in values.tolist()]
    return np.flatnonzero(numbers == values[names.index(pick(names))])
