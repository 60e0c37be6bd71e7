"""Read folders of class folders, as torchvision's ImageFolder does, and say where that cannot be what was meant."""

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from clipmerge.data.raw_split import IMAGE_SUFFIXES, Pick, RawSplit, is_part
from clipmerge.data.stored import FileImages
from clipmerge.errors import DataError
from clipmerge.text import and_more

__all__ = ["class_folders"]

_NO_FOLDERS = frozenset({"__MACOSX", "@eaDir", "lost+found", "__pycache__"})
_NO_IMAGES = frozenset({
    ".txt", ".json", ".csv", ".tsv", ".xml", ".md", ".db", ".ini", ".mat", ".html", ".parquet",
    ".zip", ".tar", ".gz", ".tgz",
})  # fmt: skip
"""What lies beside images and is nobody's loss."""


def class_folders(place: str, pick: Pick) -> RawSplit:
    """Read a folder of class folders, or of parts (`train`, `val`, `test`) that hold class folders.

    Tiny-ImageNet's `val/images` with `val_annotations.txt` is read by that file.

    Raises:
        DataError: the class folders are no classes: parts, or folders of folders.
    """
    root, remarks = _part(Path(place), pick)
    classes = _subfolders(root)
    below = (path for name in classes for path in sorted((root / name).rglob("*")))
    files = [path for path in below if not path.name.startswith(".") and (_is_image(path) or path.is_file())]
    images = [path.relative_to(root) for path in files if _is_image(path)]
    if not images:
        hint = f"put them where {root}/CLASS/image.jpg would be"
        above = root.absolute().parent
        siblings = [name for name in _subfolders(above) if any(map(_is_image, (above / name).iterdir()))]
        if len(siblings) > 1 and root.absolute().name in siblings:
            hint = f"if {root.name} is one class of {len(siblings)}, name the folder above it: {root.parent}"
        raise DataError(f"{root} holds no images in class folders", hint=hint)
    names, source = [path.as_posix() for path in images], FileImages([str(root / path) for path in images])
    lists = sorted(root.glob("*_annotations.txt"))
    if lists and len(classes) == 1:
        labels, unusable = _annotated(lists[0], images)
        there = [i for i, label in enumerate(labels) if label]
        annotated = [labels[i] for i in there]
        return RawSplit(
            source, [names[i] for i in there], annotated, unusable=unusable, which=there, remarks=remarks
        )
    remarks += _check_folders(root, images)
    remarks += _passed_over(root, files)
    empty = sorted({*classes} - {path.parts[0] for path in images})
    return RawSplit(source, names, [path.parts[0] for path in images], empty=empty, remarks=remarks)


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGE_SUFFIXES


def _subfolders(root: Path) -> list[str]:
    folders = [entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    return sorted({*folders} - _NO_FOLDERS)


def _part(root: Path, pick: Pick) -> tuple[Path, list[str]]:
    """Return the part's folder; where its images have no classes (Tiny-ImageNet's test), another may stand in."""
    parts = {name: _subfolders(root / name) for name in _subfolders(root) if is_part(name)}
    parts = {name: below for name, below in parts.items() if below}
    labelled = [
        name for name, below in parts.items() if len(below) > 1 or any(root.glob(f"{name}/*_annotations.txt"))
    ]
    part = pick([*parts] or [""])
    if labelled and part not in labelled:
        with suppress(DataError):
            other = pick([*labelled, ""])
            return root / other, [f"its {part} images are in one folder, not in classes, so {other} is taken"]
        pick([*parts])
    return root / part, []


def _check_folders(root: Path, images: Sequence[Path]) -> list[str]:
    """Refuse class folders that cannot be classes, and return what is to be said about others.

    Folders inside a class folder are fine where its images lie beside them, or where each class has one of the same
    name (`n01443537/images`). Where classes share the names of several, those are the classes (`clipart/cat`,
    `sketch/cat`), and where nothing is shared either might be.
    """
    inner: dict[str, set[str]] = {}
    for path in images:
        inner.setdefault(path.parts[0], set()).add(path.parts[1] if len(path.parts) > 2 else "")
    if len(inner) > 1 and all(map(is_part, inner)) and all(below == {""} for below in inner.values()):
        raise DataError(
            f"{root} holds {and_more(sorted(inner))} with images in them, and no class folders",
            hint="put each image in a folder of its class's name, or list paths and labels in a .csv",
        )
    nested = {name: below for name, below in inner.items() if "" not in below}
    if not nested:
        return []
    deep = any(len(path.parts) > 3 for path in images if path.parts[0] in nested)
    shared = Counter(name for below in nested.values() for name in below)
    alike = len(nested) > 1 and all(below == set(shared) for below in nested.values()) and len(shared) == 1
    if alike and not deep:
        return []
    name, below = next(iter(sorted(nested.items())))
    holds = f"class folder {name!r} holds only folders ({and_more(sorted(below), 3)})"
    if len(nested) == len(inner) and (deep or len(inner) == 1 or max(shared.values()) > 1):
        raise DataError(
            f"{root}: its {holds}, so that its name may be no class's",
            hint=f"name the folder whose folders are the classes, perhaps {root / name}; or list paths and labels "
            "in a .csv",
        )
    return [
        f"{len(nested)} of its class folders hold only folders: {name} ({and_more(sorted(below), 3)}) is one class"
    ]


def _passed_over(root: Path, files: Sequence[Path]) -> list[str]:
    """Say which files are left out that might have been images."""
    remarks = []
    beside = [path for path in root.iterdir() if _is_image(path) and path.is_file()]
    if beside:
        first = min(path.name for path in beside)
        remarks.append(f"passed over {len(beside)} images beside its class folders: {first} is in no class")
    others = Counter(path.suffix.lower() for path in files)
    others = Counter({s: n for s, n in others.items() if s not in IMAGE_SUFFIXES and s not in _NO_IMAGES})
    if others:
        listed = and_more([f"{suffix or 'no suffix'} ({count})" for suffix, count in others.most_common()], 3)
        remarks.append(f"passed over {others.total()} files that are no images by their names: {listed}")
    return remarks


def _annotated(file: Path, images: Sequence[Path]) -> tuple[list[str], list[str]]:
    """Return each image's class by a list of "name, class, box" lines, "" where it is not listed; and what is wrong."""
    lines = (line.split("\t") for line in file.read_text(encoding="utf-8").splitlines() if line.strip())
    told: Mapping[str, str] = {cells[0].strip(): cells[1].strip() for cells in lines if len(cells) > 1}
    labels = [told.get(path.name, "") for path in images]
    unusable = [
        f"{p.as_posix()}: not in {file.name}" for p, label in zip(images, labels, strict=True) if not label
    ]
    missing = sorted(told.keys() - {path.name for path in images})
    return labels, unusable + [f"{name}: in {file.name}, but no such file" for name in missing]
