"""Read a source by what it is: torchvision's data sets and the digits here, other formats in files of their own."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from inspect import signature
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from clipmerge.checkpoint.open import SUFFIXES
from clipmerge.data.class_folders import class_folders
from clipmerge.data.csv_table import is_table, table
from clipmerge.data.raw_split import IMAGE_SUFFIXES, Pick, RawSplit, expand, pick_part
from clipmerge.data.sampling import name_hash
from clipmerge.data.stored import LoadedImages
from clipmerge.data.tables import npz, parquet
from clipmerge.data.webdataset import SHARD_SUFFIXES, webdataset
from clipmerge.errors import DataError
from clipmerge.text import and_more, did_you_mean
from clipmerge.types import Ints

__all__ = ["read"]

Reader = Callable[[str, Pick], RawSplit]

BY_SUFFIX: Mapping[str, Reader] = {
    ".csv": table,
    ".tsv": table,
    ".npz": npz,
    ".parquet": parquet,
    **dict.fromkeys(SHARD_SUFFIXES, webdataset),
}


def read(place: str, part: str | None, role: str) -> tuple[RawSplit, Ints, str]:
    """Read what a source says of its images, which themselves are not read.

    Returns:
        The source; which of its items are of the part `part`, or of the one for the role where it is None; and that
        part's name.

    Raises:
        DataError: there is nothing that we know how to read.
    """

    taken = ""

    def pick(parts: Sequence[str]) -> str:
        nonlocal taken
        taken = pick_part(place, parts, part, role)
        return taken

    reader, remarks = _reader_of(place)
    raw = reader(place, pick)
    raw = replace(raw, remarks=[*remarks, *raw.remarks])
    if raw.parts is None:
        return raw, np.arange(len(raw.names)), taken
    return raw, np.flatnonzero(np.array(raw.parts) == pick(sorted(set(raw.parts)) or [""])), taken


def _reader_of(place: str) -> tuple[Reader, list[str]]:
    """Return what reads a source, and what to remark about that."""
    path = Path(place)
    if place.startswith("torchvision:"):
        return torchvision, []
    if place == "digits" and not path.exists():
        return digits, []
    if path.is_dir():
        return _reader_of_folder(path)
    paths = expand(place)
    reader = next((BY_SUFFIX[end] for end in BY_SUFFIX if paths[0].name.lower().endswith(end)), None)
    if len(paths) > 1 and reader in (webdataset, parquet):
        return reader, []
    if not path.exists():
        if any(mark in place for mark in "*?"):
            hint = "patterns are not expanded: give the folder, or of shards a range such as {0000..0099}.tar"
            raise DataError(f"there are no images at {place}", hint=hint)
        raise DataError(
            f"there are no images at {place}",
            hint="DATA is a folder of class folders, a .csv, .tsv, .npz or .parquet file, "
            "a folder of WebDataset shards, torchvision:NAME:ROOT, or digits",
        )
    if reader is None:
        hint = f"such files end in {', '.join(BY_SUFFIX)}; images go in a folder of class folders"
        if path.name.endswith(SUFFIXES):
            hint = f"it looks like a checkpoint, not like DATA; {hint}"
        raise DataError(f"{place} is not a file of images that can be read", hint=hint)
    return reader, []


def _reader_of_folder(root: Path) -> tuple[Reader, list[str]]:
    """Decide by most of what a folder holds: an archive beside class folders is left alone."""
    files = [p for pattern in ("*", "*/*") for p in root.glob(pattern) if p.is_file()]
    for reader, suffixes in ((webdataset, SHARD_SUFFIXES), (parquet, (".parquet",))):
        shards = [path for path in files if path.name.lower().endswith(suffixes)]
        images = (p for p in root.glob("*/**/*") if p.suffix.lower() in IMAGE_SUFFIXES)
        if shards and len(list(islice(images, len(shards) + 1))) <= len(shards):
            return reader, []
        if shards:
            names = and_more(sorted(path.relative_to(root).as_posix() for path in shards), 3)
            return class_folders, [f"most of it is images in folders; passed over {names}"]
    if (root / "metadata.csv").is_file() and is_table(root / "metadata.csv"):
        return table, ["read by its metadata.csv"]
    return class_folders, []


def digits(place: str, pick: Pick) -> RawSplit:
    """Read scikit-learn's 1797 handwritten digits, 8 × 8, white on black.

    In each class a hash of the item's number decides: 60 % train, 20 % val, 20 % test.
    """
    from sklearn.datasets import load_digits

    bunch = load_digits()
    labels = bunch.target
    parts = np.empty(len(labels), dtype="<U5")
    for label in range(10):
        members = sorted(np.flatnonzero(labels == label), key=lambda i: name_hash(str(i), "digits"))
        train, val = round(0.6 * len(members)), round(0.2 * len(members))
        parts[members] = np.repeat(["train", "val", "test"], [train, val, len(members) - train - val])
    pixels = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    names = [f"digits/{i:04d}" for i in range(len(labels))]
    prompts = ('a photo of the number: "{}".',)  # CLIP's own for MNIST, arXiv 2103.00020
    classes = tuple("0123456789")
    return RawSplit(LoadedImages(pixels), names, labels.tolist(), classes, parts.tolist(), templates=prompts)


def torchvision(place: str, pick: Pick) -> RawSplit:
    """Read `torchvision:NAME:ROOT`, a data set of torchvision's that was downloaded to ROOT."""
    import torchvision.datasets as known

    name, _, root = place.removeprefix("torchvision:").partition(":")
    kind = getattr(known, name, None)
    if not isinstance(kind, type) or not root:
        usage = "write torchvision:CIFAR10:ROOT"
        hint = usage if isinstance(kind, type) else did_you_mean(name, known.__all__, usage)
        raise DataError(f"{place} names no data set of torchvision's", hint=hint)
    try:
        data = kind(root, **_part_argument(kind, root, pick))
        labels = _labels(data)
    except (RuntimeError, OSError, TypeError, ValueError) as error:
        raise DataError(
            f"{place} cannot be opened: {error}",
            hint=f"download it first: torchvision.datasets.{name}({root!r}, download=True)",
        ) from error
    # Of ImageNet's names those that CLIP is prompted with are taken, by WordNet ids.
    classes = next(
        (found for name in ("wnids", "classes", "categories") if (found := getattr(data, name, None))), None
    )
    return RawSplit(
        LoadedImages(data),
        [f"{i:06d}" for i in range(len(labels))],
        labels,
        None if classes is None else tuple(n if isinstance(n, str) else str(n[0]) for n in classes),
    )


def _part_argument(kind: type, root: str, pick: Pick) -> dict[str, Any]:
    """Return the argument by which a data set of torchvision's takes its part."""
    arguments = signature(kind).parameters
    if "train" in arguments:
        return {"train": pick(["train", "test"]) == "train"}
    if "split" not in arguments:
        pick([""])
        return {}
    parts = ["train", "val", "test"]
    try:
        kind(root, split="?")
    except ValueError as error:  # "Unknown value '?' for argument split. Valid values are {'train', 'test'}."
        parts = re.findall(r"'(\w+)'", str(error))
    return {"split": pick(parts)}


def _labels(data: Any) -> list[int]:
    for attribute in ("targets", "labels", "_labels", "y"):
        if hasattr(data, attribute):
            return np.asarray(getattr(data, attribute), np.int64).tolist()  # type: ignore[no-any-return]
    pairs = getattr(data, "_samples", None) or [data[i] for i in range(len(data))]
    return [int(label) for _, label in pairs]
