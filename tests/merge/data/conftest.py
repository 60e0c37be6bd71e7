"""Small real images, as files and as bytes, in every mode that data sets hold."""

import io
import json
import tarfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


def picture(seed: int, width: int = 40, height: int = 30) -> Image.Image:
    """A smooth coloured picture that differs for every seed."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin((x * (seed % 5 + 1) + y * c + 7 * seed) / (6.0 + c)) for c in range(3)]
    return Image.fromarray(np.stack([127.5 + 127.5 * w for w in waves], -1).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "JPEG") -> bytes:
    """The image as the bytes of a file."""
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


MakeFolder = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path) -> MakeFolder:
    """folder(cat=3, dog=2, root="photos") → a folder of class folders with so many JPEGs."""

    def make(root: str = "photos", **classes: int) -> Path:
        for c, (name, count) in enumerate(classes.items()):
            (tmp_path / root / name).mkdir(parents=True)
            for i in range(count):
                picture(10 * c + i).save(tmp_path / root / name / f"{i}.jpg")
        return tmp_path / root

    return make


def shard(path: Path, members: Mapping[str, bytes] | Sequence[tuple[str, bytes]], mode: str = "w") -> Path:
    """A tar file of these members, in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:  # type: ignore[call-overload]
        for name, data in members.items() if isinstance(members, Mapping) else members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


KINDS = ("folder", "csv", "tsv", "npz", "webdataset", "parquet")
"""Kinds of sources that `store` writes."""


def store(
    kind: str,
    root: Path,
    labels: Sequence[str | int | float],
    names: Sequence[str] | None = None,
    images: Sequence[Image.Image | bytes] | None = None,
) -> Path:
    """Write small images with these labels as a source of this kind; `names` are the classes that it declares."""
    pictures = images or [picture(i, 8, 6) for i in range(len(labels))]
    files = [image if isinstance(image, bytes) else encoded(image, "PNG") for image in pictures]
    root.mkdir(parents=True, exist_ok=True)
    if kind == "folder":
        for i, (label, data) in enumerate(zip(labels, files, strict=True)):
            path = root / str(label if names is None else names[int(label)]) / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return root
    if kind in ("csv", "tsv"):
        comma = "," if kind == "csv" else "\t"
        rows = [["path", "label", *(["class_name"] if names else [])]]
        for i, (label, data) in enumerate(zip(labels, files, strict=True)):
            (root / f"{i:03d}.png").write_bytes(data)
            rows.append([f"{i:03d}.png", str(label), *([names[int(label)]] if names else [])])
        (root / f"t.{kind}").write_text("".join(comma.join(row) + "\n" for row in rows))
        return root / f"t.{kind}"
    if kind == "npz":
        arrays = {"blob": np.frombuffer(b"".join(files), np.uint8), "labels": np.array(labels)}
        arrays |= {"offsets": np.cumsum([0, *map(len, files)])}
        np.savez(root / "t.npz", **arrays, **({"classes": np.array(names)} if names else {}))
        return root / "t.npz"
    if kind == "webdataset":
        pairs = [
            (f"s{i}", data, str(label).encode())
            for i, (label, data) in enumerate(zip(labels, files, strict=True))
        ]
        shard(root / "test" / "0.tar", [m for k, d, c in pairs for m in ((f"{k}.png", d), (f"{k}.cls", c))])
        if names:
            (root / "classnames.txt").write_text("\n".join(names))
        return root
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table({"image": [{"bytes": data, "path": None} for data in files], "label": list(labels)})
    features = {"image": {"_type": "Image"}} | (
        {"label": {"_type": "ClassLabel", "names": list(names)}} if names else {}
    )
    table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, root / "test-00000.parquet")
    return root
