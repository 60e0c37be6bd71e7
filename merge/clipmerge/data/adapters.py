"""Sources of images: one small function each, from a place to what was found there."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipmerge.data.choose import name_hash
from clipmerge.data.images import Decoded, Encoded, Images, Indexed, InFiles, Picked, slices
from clipmerge.errors import DataError, nearest

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif"}
)
"""Files in class folders that count as images."""

_ROLES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev", "holdout"),
    "test": ("test", "testing", "eval", "val", "valid", "validation"),
}
_PART_NAMES = frozenset(name for names in _ROLES.values() for name in names)

Pick = Callable[[Sequence[str]], str]
"""From the names of the parts that a source has to the one to take; raises where that is not among them."""


@dataclass(frozen=True, slots=True)
class Found:
    """What an adapter found: items of one part, as the source has them.

    Attributes:
        labels: indices (an array), words, or None where there are only captions.
        classes: names by index, or the words in their order; None where the source does not say.
        elsewhere: labels that other parts of the source have: a class that only they have is not empty.
        empty: classes that the source has a place for but no image.
    """

    images: Images
    names: Sequence[str]
    labels: npt.NDArray[np.int64] | Sequence[str] | None
    classes: tuple[str, ...] | None = None
    elsewhere: Iterable[Any] = ()
    empty: tuple[str, ...] = ()
    groups: Sequence[int] | npt.NDArray[np.int64] | None = None
    group_names: tuple[str, ...] | None = None
    captions: Sequence[str] | None = None
    templates: tuple[str, ...] | None = None


def find(place: str, part: str | None, role: str) -> Found:
    """What lies at `place`.

    Raises:
        DataError: nothing that we know how to read.
    """

    def pick(parts: Sequence[str]) -> str:
        return pick_part(place, parts, part, role)

    return _adapter_of(place)(place, pick)


def pick_part(place: str, parts: Sequence[str], part: str | None, role: str) -> str:
    """The one of `parts` that `part` names, or, where it is None, that suits the role.

    A single part suits every role. Validation images stand in for test images where there are none, never the
    other way round.

    Raises:
        DataError: there is none; the hint lists those there are.
    """
    if part is None and len(parts) == 1:
        return parts[0]
    names = _ROLES.get(part or role, (part or role,))
    candidates = [part] if part in parts else [name for name in names if name in parts]
    if part == "test" and part not in parts:
        candidates = [name for name in ("testing", "eval") if name in parts]
    if candidates and candidates[0] is not None:
        return candidates[0]
    listed = ", ".join(f"#{name}" for name in parts if name) or "none"
    if part is not None:
        close = nearest(part, parts)
        guess = f"; did you mean {place}#{close}?" if close else ""
        raise DataError(f"{place} has no split {part!r}", hint=f"its splits: {listed}{guess}")
    hold = f", or hold some out: {place}#train --holdout 2%" if role == "val" and "train" in parts else ""
    raise DataError(f"{place} has no {role} split", hint=f"name one of its splits: {listed}{hold}")


def _adapter_of(place: str) -> Callable[[str, Pick], Found]:
    path = Path(place)
    if place == "digits" and not path.exists():
        return digits
    if place.startswith("torchvision:"):
        return torchvision
    if not path.exists():
        raise DataError(
            f"there are no images at {place}",
            hint="DATA is a folder of class folders, a .csv, .tsv, .npz or .parquet file, "
            "a folder of WebDataset shards, torchvision:NAME:ROOT, or digits",
        )
    if path.is_dir():
        return _folder_kind(path)
    table: dict[str, Callable[[str, Pick], Found]] = {".npz": npz}
    if path.suffix.lower() in table:
        return table[path.suffix.lower()]
    raise DataError(
        f"{place} is not a data file that can be read",
        hint="files end in .csv, .tsv, .npz, .tar or .parquet; images go in a folder of class folders",
    )


def _folder_kind(path: Path) -> Callable[[str, Pick], Found]:
    return folder


def digits(place: str, pick: Pick) -> Found:
    """scikit-learn's 1797 handwritten digits, 8 × 8, white on black.

    In each class a hash of the item's number decides: 60 % train, 20 % val, 20 % test.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    labels = np.asarray(bunch.target, np.int64)
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    part = np.empty(len(labels), dtype="<U5")
    for label in range(10):
        members = sorted(np.flatnonzero(labels == label), key=lambda i: name_hash(str(i), "digits"))
        part[members] = np.repeat(
            ["train", "val", "test"],
            [n := round(0.6 * len(members)), m := round(0.2 * len(members)), len(members) - n - m],
        )
    index = np.flatnonzero(part == pick(["train", "val", "test"]))
    names = [f"digits/{i:04d}" for i in index]
    return Found(Picked(Decoded(pixels), index), names, labels[index], tuple("0123456789"))


def folder(place: str, pick: Pick) -> Found:
    """A folder of class folders, or of parts (`train`, `val`, `test`) that hold class folders."""
    root = Path(place)
    parts = _subfolders(root)
    if parts and all(name in _PART_NAMES for name in parts):
        root = root / pick(parts)
    else:
        pick([""])
    classes = _subfolders(root)
    files = {name: _image_files(root / name) for name in classes}
    paths = [path for name in classes for path in files[name]]
    if not paths:
        raise DataError(
            f"{root} holds no images in class folders", hint=f"put them where {root}/CLASS/image.jpg would be"
        )
    return Found(
        InFiles(paths),
        [path.relative_to(root).as_posix() for path in paths],
        [name for name in classes for _ in files[name]],
        tuple(classes),
        empty=tuple(name for name in classes if not files[name]),
    )


def _subfolders(root: Path) -> list[str]:
    return sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def _image_files(root: Path) -> list[Path]:
    return sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))


def npz(place: str, pick: Pick) -> Found:
    """An .npz: `labels`, and `images` or `blob` with `offsets`; maybe `split`, `classes`, `groups`."""
    arrays = _arrays(place)
    labels = arrays["labels"].astype(np.int64)
    if "images" in arrays:
        images: Images = Decoded(arrays["images"])
        shape = arrays["images"].shape
        fits = arrays["images"].dtype == np.uint8 and (len(shape) == 3 or (len(shape) == 4 and shape[3] == 3))
    else:
        offsets, blob = arrays["offsets"].astype(np.int64), arrays["blob"]
        images = Encoded(max(len(offsets) - 1, 0), slices(blob, offsets))
        fits = blob.dtype == np.uint8 and bool((np.diff(offsets, prepend=0, append=len(blob)) >= 0).all())
    wrong = [key for key in ("split", "groups") if key in arrays and arrays[key].shape != labels.shape]
    if not fits or wrong or labels.ndim != 1 or len(images) != len(labels):
        raise DataError(f"{place}: {_npz_problem(arrays, wrong)}", hint=_NPZ)
    order = ("train", "val", "test")
    numbers = arrays.get("split")
    if numbers is None:
        pick([""])
        index = np.arange(len(labels))
    else:
        present = [name for k, name in enumerate(order) if (numbers == k).any()]
        index = np.flatnonzero(numbers == order.index(pick(present)))
    return Found(
        Picked(images, index),
        [f"{i:06d}" for i in index],
        labels[index],
        tuple(map(str, arrays["classes"])) if "classes" in arrays else None,
        elsewhere=np.unique(labels).tolist(),
        groups=arrays["groups"].astype(np.int64)[index] if "groups" in arrays else None,
        group_names=tuple(map(str, arrays["group_names"])) if "group_names" in arrays else None,
    )


_NPZ = (
    "an .npz holds labels (n), split (n; 0 train, 1 val, 2 test), classes, and images (n, H, W) or "
    "(n, H, W, 3) in uint8, or blob (uint8) with offsets (n + 1) of encoded images"
)


def _npz_problem(arrays: dict[str, npt.NDArray[Any]], wrong: Sequence[str]) -> str:
    shapes = ", ".join(f"{key} {a.dtype} {a.shape}" for key, a in arrays.items())
    length = f"{', '.join(wrong)} of another length; " if wrong else ""
    return f"its arrays do not fit together ({length}{shapes})"


def _arrays(place: str) -> dict[str, npt.NDArray[Any]]:
    import zipfile

    wanted = {"labels", "images", "blob", "offsets", "split", "classes", "groups", "group_names"}
    try:
        with np.load(place, allow_pickle=False) as file:
            arrays = {key: file[key] for key in file.files if key in wanted}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{place} cannot be read as .npz: {error}", hint=_NPZ) from error
    if "labels" not in arrays or not ("images" in arrays or {"blob", "offsets"} <= arrays.keys()):
        raise DataError(f"{place} has no labels, or no images", hint=_NPZ)
    return arrays


def torchvision(place: str, pick: Pick) -> Found:
    """`torchvision:NAME:ROOT`: a data set that torchvision has already downloaded to ROOT."""
    raise DataError(place)


__all__ = ["Found", "Indexed", "digits", "find", "folder", "npz", "pick_part", "torchvision"]
