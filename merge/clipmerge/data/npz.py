"""Read an .npz of labels and images, decoded or encoded."""

import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from clipmerge.data.raw_split import Pick, RawSplit
from clipmerge.data.stored import Stored, file_stamp
from clipmerge.errors import DataError

__all__ = ["npz"]

Arrays = Mapping[str, npt.NDArray[Any]]

_NAMES = frozenset({"labels", "images", "blob", "offsets", "split", "classes", "groups", "group_names"})
_PARTS: Mapping[object, str] = {0: "train", 1: "val", 2: "test"}
_HINT = (
    "an .npz holds labels (n), split (n; 0 train, 1 val, 2 test), classes, and images (n, H, W) or "
    "(n, H, W, 3) in uint8, or blob (uint8) with offsets (n + 1) of encoded images"
)


@dataclass(frozen=True)
class NpzImages:
    """The images of an .npz. A worker process reads the file again instead of getting a copy of the arrays."""

    path: str
    images: Sequence[Stored] | npt.NDArray[np.uint8]

    def __reduce__(self) -> tuple[Any, ...]:
        return _read_again, (self.path,)

    def fetch(self, i: int) -> Stored:
        return self.images[i]

    def stamp(self, i: int) -> str:
        return f"{file_stamp(self.path)}\0{i}"


def _read_again(path: str) -> NpzImages:
    return NpzImages(path, _images(_load(path)))


def npz(place: str, pick: Pick) -> RawSplit:
    """Read an .npz: `labels`, and `images` or `blob` with `offsets`; maybe `split`, `classes`, `groups`."""
    arrays = _load(place)
    labels, classes = arrays["labels"], arrays.get("classes")
    wrong = [key for key in ("split", "groups") if key in arrays and arrays[key].shape != labels.shape]
    if wrong or not _fit(arrays):
        shapes = ", ".join(f"{key} {array.dtype} {array.shape}" for key, array in arrays.items())
        length = f"{', '.join(wrong)} of another length; " if wrong else ""
        raise DataError(f"{place}: its arrays do not fit together ({length}{shapes})", hint=_HINT)
    are_words = labels.dtype.kind == "U"
    if classes is None and are_words:
        classes = np.unique(labels)
    numbers = arrays["split"].tolist() if "split" in arrays else [""] * len(labels)
    return RawSplit(
        NpzImages(place, _images(arrays)),
        [f"{i:06d}" for i in range(len(labels))],
        labels.tolist() if are_words else labels.astype(np.int64),
        None if classes is None else tuple(map(str, classes)),
        [_PARTS.get(number, str(number)) for number in numbers],
        groups=arrays["groups"].astype(np.int64) if "groups" in arrays else None,
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


def _images(arrays: Arrays) -> Sequence[bytes] | npt.NDArray[np.uint8]:
    if "images" in arrays:
        return arrays["images"]
    return [arrays["blob"][start:end].tobytes() for start, end in pairwise(arrays["offsets"].tolist())]


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
