"""Sources of images: one small function each, from a place to what was found there."""

import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from clipmerge.data.choose import name_hash
from clipmerge.data.found import Found, Pick, is_part, pick_part
from clipmerge.data.images import Decoded, Encoded, Images, Indexed, InFiles, Picked, slices
from clipmerge.data.shards import parquet, webdataset
from clipmerge.data.tables import table
from clipmerge.errors import DataError
from clipmerge.text import nearest

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".avif"}
)
"""Files in class folders that count as images."""


def find(place: str, part: str | None, role: str) -> Found:
    """What lies at `place`.

    Raises:
        DataError: nothing that we know how to read.
    """

    def pick(parts: Sequence[str]) -> str:
        return pick_part(place, parts, part, role)

    return _adapter_of(place)(place, pick)


def _adapter_of(place: str) -> Callable[[str, Pick], Found]:
    path = Path(place)
    if place.startswith("torchvision:"):
        return torchvision
    if place == "digits" and not path.exists():
        return digits
    if not path.exists():
        raise DataError(
            f"there are no images at {place}",
            hint="DATA is a folder of class folders, a .csv, .tsv, .npz or .parquet file, "
            "a folder of WebDataset shards, torchvision:NAME:ROOT, or digits",
        )
    if path.is_dir():
        within = {entry.suffix for pattern in ("*", "*/*") for entry in path.glob(pattern) if entry.is_file()}
        return webdataset if ".tar" in within else parquet if ".parquet" in within else folder
    if path.suffix.lower() not in BY_SUFFIX:
        raise DataError(
            f"{place} is not a file of images that can be read",
            hint=f"such files end in {', '.join(BY_SUFFIX)}; images go in a folder of class folders",
        )
    return BY_SUFFIX[path.suffix.lower()]


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
    parts = [name for name in _subfolders(root) if is_part(name) and _subfolders(root / name)]
    if parts:
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
    labels = arrays["labels"]
    if "images" in arrays:
        images: Images = Decoded(arrays["images"])
        shape = arrays["images"].shape
        fits = arrays["images"].dtype == np.uint8 and (len(shape) == 3 or (len(shape) == 4 and shape[3] == 3))
    else:
        offsets, blob = arrays["offsets"].astype(np.int64), arrays["blob"]
        images = Encoded(max(len(offsets) - 1, 0), slices(blob, offsets))
        fits = blob.dtype == np.uint8 and bool((np.diff(offsets, prepend=0, append=len(blob)) >= 0).all())
    wrong = [key for key in ("split", "groups") if key in arrays and arrays[key].shape != labels.shape]
    if not fits or wrong or labels.ndim != 1 or labels.dtype.kind not in "iuU" or len(images) != len(labels):
        raise DataError(f"{place}: {_npz_problem(arrays, wrong)}", hint=_NPZ)
    index = _npz_part(arrays.get("split"), len(labels), pick)
    words = labels.dtype.kind == "U"
    return Found(
        Picked(images, index),
        [f"{i:06d}" for i in index],
        labels[index].tolist() if words else labels[index].astype(np.int64),
        tuple(map(str, arrays["classes"] if "classes" in arrays else np.unique(labels)))
        if words or "classes" in arrays
        else None,
        elsewhere=np.unique(labels).tolist(),
        groups=arrays["groups"].astype(np.int64)[index] if "groups" in arrays else None,
        group_names=tuple(map(str, arrays["group_names"])) if "group_names" in arrays else None,
    )


def _npz_part(numbers: npt.NDArray[Any] | None, count: int, pick: Pick) -> npt.NDArray[np.int64]:
    """Which items are of the part: by name, or by number (0 train, 1 val, 2 test)."""
    if numbers is None:
        pick([""])
        return np.arange(count)
    names = dict(enumerate(("train", "val", "test")))
    parts = [names.get(int(n), str(n)) if numbers.dtype.kind in "iu" else str(n) for n in np.unique(numbers)]
    return np.flatnonzero(numbers == np.unique(numbers)[parts.index(pick(parts))])


_NPZ = (
    "an .npz holds labels (n), split (n; 0 train, 1 val, 2 test), classes, and images (n, H, W) or "
    "(n, H, W, 3) in uint8, or blob (uint8) with offsets (n + 1) of encoded images"
)


def _npz_problem(arrays: dict[str, npt.NDArray[Any]], wrong: Sequence[str]) -> str:
    shapes = ", ".join(f"{key} {a.dtype} {a.shape}" for key, a in arrays.items())
    length = f"{', '.join(wrong)} of another length; " if wrong else ""
    return f"its arrays do not fit together ({length}{shapes})"


def _arrays(place: str) -> dict[str, npt.NDArray[Any]]:

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
    """`torchvision:NAME:ROOT`: a data set of torchvision's that was downloaded to ROOT."""
    import torchvision.datasets as known

    name, _, root = place.removeprefix("torchvision:").partition(":")
    kind = getattr(known, name, None)
    if not isinstance(kind, type) or not root:
        close = nearest(name, known.__all__)
        guess = f"; did you mean {close}?" if close and not isinstance(kind, type) else ""
        raise DataError(
            f"{place} names no data set of torchvision's", hint=f"write torchvision:CIFAR10:ROOT{guess}"
        )
    try:
        data = kind(root, **_torchvision_part(kind, root, pick))
        labels = _torchvision_labels(data)
    except (RuntimeError, OSError, TypeError, ValueError) as error:
        raise DataError(
            f"{place} cannot be opened: {error}",
            hint=f"download it first: torchvision.datasets.{name}({root!r}, download=True)",
        ) from error
    names = getattr(data, "classes", None) or getattr(data, "categories", None)
    return Found(
        Indexed(len(labels), lambda i: data[i][0]),
        [f"{i:06d}" for i in range(len(labels))],
        labels,
        None if names is None else tuple(n if isinstance(n, str) else str(n[0]) for n in names),
    )


def _torchvision_part(kind: type, root: str, pick: Pick) -> dict[str, Any]:
    """The argument by which a data set of torchvision's takes its part."""
    arguments = signature(kind).parameters
    if "train" in arguments:
        return {"train": pick(["train", "test"]) == "train"}
    if "split" not in arguments:
        pick([""])
        return {}
    try:
        kind(root, split="?")
    except ValueError as error:  # "Unknown value '?' for argument split. Valid values are {'train', 'test'}."
        return {"split": pick(re.findall(r"'(\w+)'", str(error)))}
    return {"split": pick(["train", "val", "test"])}


def _torchvision_labels(data: Any) -> npt.NDArray[np.int64]:
    for attribute in ("targets", "labels", "_labels", "y"):
        if hasattr(data, attribute):
            return np.asarray(getattr(data, attribute), np.int64)
    pairs = getattr(data, "_samples", None) or [data[i] for i in range(len(data))]
    return np.asarray([label for _, label in pairs], np.int64)


BY_SUFFIX: Mapping[str, Callable[[str, Pick], Found]] = {
    ".csv": table,
    ".tsv": table,
    ".npz": npz,
    ".parquet": parquet,
    ".tar": webdataset,
}
"""How a file's name ends → what reads it."""
