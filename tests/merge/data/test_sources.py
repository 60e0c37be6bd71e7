"""Every kind of source gives the same kind of Split."""

import io
import pickle
import struct
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clipmerge.data.open import open_split
from clipmerge.errors import DataError, MissingExtraError

from .conftest import MakeFolder, encoded, picture


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# --- tables


def test_a_csv_of_paths_and_words(folder: MakeFolder) -> None:
    root = folder(cat=2, dog=1)
    table = write(root / "a.csv", "filepath,label\ndog/0.jpg,dog\ncat/0.jpg,big_cat\n\ncat/1.jpg,big_cat\n")
    split = open_split(table)
    assert split.classes == ("big cat", "dog")
    assert split.labels.tolist() == [1, 0, 0]
    assert split.names == ("dog/0.jpg", "cat/0.jpg", "cat/1.jpg")
    assert split.read_bytes(0) == (root / "dog" / "0.jpg").read_bytes()
    assert (split.groups, split.captions, split.templates) == (None, None, None)


def test_a_csv_without_a_line_of_names(folder: MakeFolder) -> None:
    table = write(folder(cat=1, dog=1) / "a.csv", "dog/0.jpg,1\ncat/0.jpg,0\n")
    split = open_split(table)
    assert (split.classes, split.labels.tolist()) == (("0", "1"), [1, 0])


def test_a_tsv_of_captions(folder: MakeFolder) -> None:
    root = folder(cat=1, dog=1)
    split = open_split(write(root / "a.csv", "title\tfilepath\na cat, asleep\tcat/0.jpg\na dog\tdog/0.jpg\n"))
    assert split.captions == ("a cat, asleep", "a dog")
    assert split.classes == ()
    assert split.labels.tolist() == [-1, -1]


def test_numbers_with_names_groups_and_parts(folder: MakeFolder) -> None:
    root = folder(cat=3, dog=2)
    table = write(
        root / "a.tsv",
        "image\tlabel\tclass_name\tgroup\tsplit\ttitle\n"
        "cat/0.jpg\t0\tcat\tnight\ttrain\tone\n"
        "cat/1.jpg\t0\tcat\tday\tval\ttwo\n"
        "dog/0.jpg\t1\tdog\tnight\tval\tthree\n"
        "dog/1.jpg\t1\tdog\tday\ttrain\tfour\n",
    )
    split = open_split(f"{table}#val")
    assert split.names == ("cat/1.jpg", "dog/0.jpg")
    assert split.classes == ("cat", "dog")
    assert split.labels.tolist() == [0, 1]
    assert split.group_names == ("day", "night")
    assert split.groups is not None
    assert split.groups.tolist() == [0, 1]
    assert split.captions == ("two", "three")


def test_a_class_of_another_part_only_is_not_empty(folder: MakeFolder) -> None:
    root = folder(cat=1, dog=1)
    table = write(root / "a.csv", "path,label,split\ncat/0.jpg,cat,train\ndog/0.jpg,dog,val\n")
    split = open_split(f"{table}#val")
    assert (split.classes, split.labels.tolist(), split.class_subset) == (("cat", "dog"), [1], None)


def test_absolute_paths_leave_no_trace_in_names(folder: MakeFolder) -> None:
    root = folder(cat=1, dog=1)
    table = write(root / "a.csv", f"path,label\n{root}/cat/0.jpg,cat\n{root}/dog/0.jpg,dog\n")
    assert open_split(table).names == ("cat/0.jpg", "dog/0.jpg")


def test_an_image_with_two_captions_is_held_out_with_both(folder: MakeFolder) -> None:
    root = folder(cat=6, dog=6)
    lines = [f"{c}/{i}.jpg,{text}" for c in ("cat", "dog") for i in range(6) for text in ("one", "two")]
    held = open_split(write(root / "a.csv", "\n".join(["path,caption", *lines])), holdout="50%")
    assert "cat/0.jpg (2)" in open_split(root / "a.csv").names
    assert 0 < len(held) < 24
    assert {n for n in held.names if "(2)" in n} == {f"{n} (2)" for n in held.names if "(2)" not in n}


def test_a_table_that_misses_things(folder: MakeFolder) -> None:
    root = folder(cat=1)
    table = write(root / "a.csv", "path,label\ncat/0.jpg,cat\ncat/7.jpg,cat\ncat/0.jpg,\n")
    with pytest.raises(DataError) as caught:
        open_split(table)
    assert caught.value.message.splitlines() == [
        f"{table}: 2 items cannot be used",
        "  line 4: no label",
        "  cat/7.jpg: no such file",
    ]
    assert open_split(table, skip_bad=True).names == ("cat/0.jpg",)


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "path,size\nx.jpg,3\n"])
def test_a_table_without_the_columns(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError) as caught:
        open_split(write(tmp_path / "a.csv", text))
    assert caught.value.message.endswith("a.csv has no column of paths with one of labels or captions")
    assert "the first line names the columns" in str(caught.value.hint)


def test_a_table_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(DataError, match="cannot be read as a table"):
        open_split(tmp_path / "a.csv")


def test_labels_out_of_range(folder: MakeFolder) -> None:
    table = write(folder(cat=2, dog=1) / "a.csv", "cat/0.jpg,0\ncat/1.jpg,2\ndog/0.jpg,-1\n")
    names = write(table.parent / "names.txt", "cat\ndog\n")
    with pytest.raises(DataError) as caught:
        open_split(table, classnames=names)
    assert caught.value.message.splitlines()[1:] == [
        "  cat/1.jpg: label 2 is not in 0 … 1",
        "  dog/0.jpg: label -1 is not in 0 … 1",
    ]
    kept = open_split(table, classnames=names, skip_bad=True)
    assert (kept.names, kept.classes) == (("cat/0.jpg",), ("cat", "dog"))


# --- npz


def test_npz_of_arrays(tmp_path: Path) -> None:
    images = np.arange(4 * 6 * 5, dtype=np.uint8).reshape(4, 6, 5)
    np.savez(
        tmp_path / "a.npz",
        images=images,
        labels=np.array([1, 0, 1, 0], np.int16),
        split=np.array([0, 1, 1, 2], np.uint8),
        classes=np.array(["cat", "dog"]),
        groups=np.array([0, 1, 0, 1]),
    )
    split = open_split(f"{tmp_path}/a.npz#val")
    assert split.names == ("000001", "000002")
    assert split.labels.tolist() == [0, 1]
    assert split.classes == ("cat", "dog")
    assert split.groups is not None
    assert split.groups.tolist() == [1, 0]
    assert np.array_equal(np.asarray(split.image(1)), np.repeat(images[2][..., None], 3, 2))
    assert len(open_split(tmp_path / "a.npz")) == 1, "the test part"


def test_npz_of_encoded_images(tmp_path: Path) -> None:
    files = [encoded(picture(0)), encoded(picture(1), "PNG")]
    offsets = np.cumsum([0, *map(len, files)])
    blob = np.frombuffer(b"".join(files), np.uint8)
    np.savez(tmp_path / "a.npz", blob=blob, offsets=offsets, labels=np.array([0, 1]), classes=["a", "b"])
    split = open_split(tmp_path / "a.npz")
    assert [split.read_bytes(i) for i in range(2)] == files
    assert np.array_equal(np.asarray(split.image(1)), np.asarray(picture(1)))


def test_npz_of_words(tmp_path: Path) -> None:
    images = np.zeros((3, 2, 2), np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=["owl", "cat", "owl"], split=["val", "train", "val"])
    split = open_split(f"{tmp_path}/a.npz#val")
    assert (split.classes, split.labels.tolist(), split.names) == (
        ("cat", "owl"),
        [1, 1],
        ("000000", "000002"),
    )


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": [0]}, "has no labels, or no images"),
        (
            {"labels": [0, 1], "images": np.zeros((3, 2, 2), np.uint8)},
            "its arrays do not fit together (labels int64",
        ),
        ({"labels": [0], "images": np.zeros((1, 2, 2), np.float32)}, "images float32 (1, 2, 2)"),
        ({"labels": [0], "blob": np.zeros(9, np.uint8), "offsets": [0, 99]}, "do not fit together"),
        (
            {"labels": [0], "images": np.zeros((1, 2, 2), np.uint8), "split": [0, 1]},
            "split of another length",
        ),
        ({"labels": [0.5], "images": np.zeros((1, 2, 2), np.uint8)}, "labels float64 (1,)"),
        ({"labels": np.array([{}]), "images": np.zeros((1, 2, 2), np.uint8)}, "cannot be read as .npz"),
    ],
)
def test_npz_that_does_not_fit(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(DataError) as caught:
        open_split(tmp_path / "a.npz")
    assert message in caught.value.message
    assert "an .npz holds labels" in str(caught.value.hint)


def test_npz_with_a_class_without_images(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((1, 2, 2), np.uint8), labels=[0], classes=["cat", "dog"])
    with pytest.raises(DataError, match="class 'dog': no images"):
        open_split(tmp_path / "a.npz")


# --- WebDataset


def shard(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    root = tmp_path / "wds"
    shard(
        root / "test" / "0.tar",
        {"s0.jpg": encoded(picture(0)), "s0.cls": b"1", "s1.png": encoded(picture(1), "PNG")},
    )
    with tarfile.open(root / "test" / "0.tar", "a") as tar:
        info = tarfile.TarInfo("s1.cls")
        info.size = 2
        tar.addfile(info, io.BytesIO(b"0\n"))
    shard(root / "test" / "1.tar", {"s2.cls": b"1", "s2.webp": encoded(picture(2), "WEBP")})
    shard(root / "train" / "0.tar", {"t0.cls": b"0", "t0.webp": encoded(picture(3), "WEBP")})
    write(root / "classnames.txt", "red fox\nowl\n")
    write(root / "zeroshot_classification_templates.txt", "a photo of a {c}.\nan owl or a {c}\n")
    return root


def test_webdataset_in_clip_benchmarks_layout(shards: Path) -> None:
    split = open_split(shards)
    assert split.names == ("s0", "s1", "s2")
    assert split.labels.tolist() == [1, 0, 1]
    assert split.classes == ("red fox", "owl")
    assert split.templates == ("a photo of a {}.", "an owl or a {}")
    assert split.read_bytes(1) == encoded(picture(1), "PNG")
    assert np.array_equal(np.asarray(split.image(1)), np.asarray(picture(1)))
    assert open_split(f"{shards}#train", skip_bad=True).names == ("t0",)
    assert open_split(shards / "test").classes == ("red fox", "owl")
    assert open_split(shards / "test" / "0.tar").templates == split.templates


def test_webdataset_that_misses_labels(shards: Path) -> None:
    shard(
        shards / "test" / "2.tar",
        {"s3.jpg": encoded(picture(0)), "s4.jpg": encoded(picture(0)), "s4.cls": b"x"},
    )
    with pytest.raises(DataError) as caught:
        open_split(shards)
    assert caught.value.message.splitlines()[1:] == [
        "  s3: no .cls beside it",
        "  s4: label 'x' is not a number, as others are",
    ]


def test_a_shard_that_is_cut_off(shards: Path) -> None:
    whole = (shards / "test" / "0.tar").read_bytes()
    (shards / "test" / "0.tar").write_bytes(whole[:700])
    with pytest.raises(DataError, match=r"0\.tar cannot be read as a \.tar"):
        open_split(shards)


def test_a_compressed_shard(shards: Path) -> None:
    (shards / "test" / "0.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    with pytest.raises(DataError) as caught:
        open_split(shards)
    assert "uncompressed" in str(caught.value.hint)


# --- Parquet


@pytest.fixture
def parquet(tmp_path: Path) -> Path:
    pa = pytest.importorskip("pyarrow")
    import json

    import pyarrow.parquet as pq

    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat", "dog"]}}
    for part, labels in (("train", [0, 1, 1]), ("test", [1, 0])):
        images = [{"bytes": encoded(picture(i), "PNG"), "path": f"{part}{i}.png"} for i in range(len(labels))]
        table = pa.table({"image": images, "label": labels})
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        (tmp_path / "hf" / "data").mkdir(parents=True, exist_ok=True)
        pq.write_table(table, tmp_path / "hf" / "data" / f"{part}-00000-of-00001.parquet", row_group_size=2)
    return tmp_path / "hf"


def test_parquet_as_hugging_face_stores_it(parquet: Path) -> None:
    split = open_split(f"{parquet}#train")
    assert split.names == ("train0.png", "train1.png", "train2.png")
    assert split.labels.tolist() == [0, 1, 1]
    assert split.classes == ("cat", "dog")
    for i in (2, 0, 1):
        assert split.read_bytes(i) == encoded(picture(i), "PNG")
    assert open_split(parquet).labels.tolist() == [1, 0]
    assert open_split(parquet / "data" / "test-00000-of-00001.parquet").names == ("test0.png", "test1.png")


def test_parquet_without_images(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"a": [1], "b": [2]}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match="has no images with labels or captions, its columns: a, b"):
        open_split(tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(b"nothing")
    with pytest.raises(DataError, match=r"b\.parquet cannot be read as Parquet"):
        open_split(tmp_path / "b.parquet")


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(MissingExtraError) as caught:
        open_split(tmp_path / "a.parquet")
    assert caught.value.message.endswith("a.parquet needs pyarrow")
    assert caught.value.hint == "pip install 'clipmerge[parquet]'"


# --- torchvision


def idx(path: Path, array: np.ndarray[Any, np.dtype[np.uint8]]) -> None:
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + array.tobytes())


def test_torchvisions_data_sets(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (20, 28, 28), dtype=np.uint8)
    labels = np.arange(20, dtype=np.uint8) % 10
    for part, count in (("train", 20), ("t10k", 10)):
        idx(tmp_path / "MNIST" / "raw" / f"{part}-images-idx3-ubyte", images[:count])
        idx(tmp_path / "MNIST" / "raw" / f"{part}-labels-idx1-ubyte", labels[:count])
    split = open_split(f"torchvision:MNIST:{tmp_path}#train")
    assert split.labels.tolist() == labels.tolist()
    assert split.classes[:2] == ("zero", "one"), "the numbers in front are left out"
    assert np.array_equal(np.asarray(split.image(7))[..., 0], images[7])
    assert len(open_split(f"torchvision:MNIST:{tmp_path}")) == 10


def test_torchvisions_own_folders(folder: MakeFolder) -> None:
    split = open_split(f"torchvision:ImageFolder:{folder(cat=2, dog=1)}")
    assert (split.classes, split.labels.tolist()) == (("cat", "dog"), [0, 0, 1])


def test_torchvision_data_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_split(f"torchvision:CIFAR10:{tmp_path}#test")
    assert caught.value.message.startswith(f"torchvision:CIFAR10:{tmp_path} cannot be opened: ")
    assert (
        caught.value.hint == f"download it first: torchvision.datasets.CIFAR10('{tmp_path}', download=True)"
    )


def test_torchvision_has_no_such_data_set(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_split(f"torchvision:CIFAR11:{tmp_path}")
    assert caught.value.hint is not None
    assert caught.value.hint.endswith("did you mean CIFAR10?")


def test_parts_by_a_split_argument(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_split(f"torchvision:DTD:{tmp_path}#tset")
    assert "did you mean #test?" in str(caught.value.hint)


def test_a_tall_image_in_a_mode_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "x" / "gray").mkdir(parents=True)
    Image.new("L", (3, 9), 77).save(tmp_path / "x" / "gray" / "a.png")
    split = open_split(tmp_path / "x")
    assert split.image(0).size == (3, 9)
    assert split.image(0).getpixel((1, 1)) == (77, 77, 77)


# --- worker processes


@pytest.mark.parametrize(
    "kind", ["folder", "csv", "npz", "encoded npz", "tar", "parquet", "torchvision", "digits"]
)
def test_a_split_of_every_source_pickles_without_its_images(
    kind: str, folder: MakeFolder, shards: Path, parquet: Path, tmp_path: Path
) -> None:
    files = [encoded(picture(i)) for i in range(2)]
    blob, offsets = np.frombuffer(b"".join(files), np.uint8), np.cumsum([0, *map(len, files)])
    big = np.random.default_rng(0).integers(0, 256, (2, 300, 300), dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=big, labels=[0, 1])
    np.savez(
        tmp_path / "b.npz", blob=np.append(blob, np.zeros(50000, np.uint8)), offsets=offsets, labels=[0, 1]
    )
    root = folder(cat=2, dog=1)
    write(root / "a.csv", "dog/0.jpg,1\ncat/0.jpg,0\n")
    source = {
        "folder": root,
        "csv": root / "a.csv",
        "npz": tmp_path / "a.npz",
        "encoded npz": tmp_path / "b.npz",
        "tar": shards,
        "parquet": parquet,
        "torchvision": f"torchvision:ImageFolder:{root}",
        "digits": "digits",
    }[kind]
    split = open_split(f"{source}@invert", limit=2)
    split.covered(torch.zeros(1, len(split.classes)))
    raw = pickle.dumps(split)
    assert len(raw) < 150_000
    copy = pickle.loads(raw)
    assert copy.digest == split.digest
    for i in range(len(split)):
        assert np.array_equal(np.asarray(copy.image(i)), np.asarray(split.image(i)))


def test_each_file_is_read_once_to_open_it_and_once_to_decode_it(
    folder: MakeFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clipmerge.data.pixels import pixels
    from clipmerge.data.stored import FileImages

    reads: list[int] = []
    plain = FileImages.fetch
    monkeypatch.setattr(FileImages, "fetch", lambda self, i: (reads.append(i), plain(self, i))[1])
    split = open_split(folder(cat=2, dog=1))
    assert sorted(reads) == [0, 1, 2]
    assert len(split.digest) == 64
    pixels(split, {"size": 8}, cache=tmp_path / "c")
    assert sorted(reads) == [0, 0, 1, 1, 2, 2]
