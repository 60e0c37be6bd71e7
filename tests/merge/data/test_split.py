"""DATA text → Split: parts, names, labels, what is held out, and what is refused."""

import io
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest

from clipmerge.data.open import open_split, parse_source
from clipmerge.data.shifts import Shift
from clipmerge.data.stored import decode
from clipmerge.errors import DataError

from .conftest import MakeFolder, encoded, picture


def test_digits_are_split_the_same_way_everywhere() -> None:
    train, val, test = (open_split(f"digits#{part}") for part in ("train", "val", "test"))
    assert [len(train), len(val), len(test)] == [1078, 359, 360]
    assert len({*train.names, *val.names, *test.names}) == 1797
    assert test.classes == tuple("0123456789")
    assert test.names[:3] == ("digits/0002", "digits/0007", "digits/0018")
    assert np.bincount(test.labels).tolist() == [35, 37, 36, 36, 36, 37, 36, 36, 35, 36]


def test_digits_are_what_scikit_learn_has() -> None:
    from sklearn.datasets import load_digits

    split, bunch = open_split("digits#val"), load_digits()
    number = int(split.names[5].removeprefix("digits/"))
    assert split.labels[5] == bunch.target[number]
    expected = np.round(bunch.images[number] * 255 / 16).astype(np.uint8)
    assert np.array_equal(np.asarray(split.image(5))[..., 1], expected)
    assert split.read_bytes(5) is None


@pytest.mark.parametrize(
    ("role", "same_as"), [(None, "digits#test"), ("val", "digits#val"), ("train", "digits#train")]
)
def test_a_bare_source_gives_the_part_for_the_role(role: str | None, same_as: str) -> None:
    assert open_split("digits", role=role).digest == open_split(same_as).digest


def test_a_folder_of_class_folders(folder: MakeFolder) -> None:
    root = folder(dog=2, golden_retriever=1, cat=3)
    split = open_split(root)
    assert split.classes == ("cat", "dog", "golden retriever")
    assert split.names == (
        *("cat/0.jpg", "cat/1.jpg", "cat/2.jpg"),
        *("dog/0.jpg", "dog/1.jpg", "golden_retriever/0.jpg"),
    )
    assert split.labels.tolist() == [0, 0, 0, 1, 1, 2]
    assert split.labels.dtype == np.int64
    assert split.class_subset is None
    assert split.image(3).mode == "RGB"
    assert split.read_bytes(3) == (root / "dog" / "0.jpg").read_bytes()


def test_folders_of_parts(folder: MakeFolder) -> None:
    root = folder("photos/train", cat=1, dog=2).parent
    folder("photos/val", cat=1, dog=1)
    assert len(open_split(f"{root}#train")) == 3
    assert open_split(f"{root}#valid").names == ("cat/0.jpg", "dog/0.jpg")
    assert open_split(root, role="test").names == ("cat/0.jpg", "dog/0.jpg"), "val stands in for test"


def test_folders_beside_parts_and_parts_of_other_names(folder: MakeFolder) -> None:
    root = folder("photos/train", cat=1, train=2).parent
    folder("photos/test_blurred", cat=1, train=1)
    folder("photos/annotations", xml=0)
    assert open_split(root, role="train").classes == ("cat", "train")
    assert open_split(f"{root}#test_blurred").names == ("cat/0.jpg", "train/0.jpg")


def test_a_class_may_be_called_train(folder: MakeFolder) -> None:
    assert open_split(folder(plane=1, train=1)).classes == ("plane", "train")


def test_test_images_never_stand_in_for_held_out_ones(folder: MakeFolder) -> None:
    root = folder("photos/train", cat=1, dog=2).parent
    folder("photos/test", cat=1, dog=1)
    with pytest.raises(DataError) as caught:
        open_split(root, role="val")
    assert caught.value.message == f"{root} has no val split"
    assert caught.value.hint == (
        f"name one of its splits: #test, #train, or hold some out: {root}#train with --holdout 2%"
    )


def test_an_unknown_part_lists_those_there_are() -> None:
    with pytest.raises(DataError) as caught:
        open_split("digits#tests")
    assert caught.value.message == "digits has no split 'tests'"
    assert caught.value.hint == "its splits: #test, #train, #val; did you mean #test?"


def test_a_part_of_a_source_without_parts_is_refused(folder: MakeFolder) -> None:
    root = folder(cat=1, dog=1)
    with pytest.raises(DataError, match="has no splits, so there is no #val"):
        open_split(f"{root}#val")


def test_sources_are_cut_only_where_no_such_path_exists(tmp_path: Path) -> None:
    assert parse_source("digits#test@rotate:20@invert") == (
        "digits",
        "test",
        [Shift("rotate", 20), Shift("invert", 1)],
    )
    assert parse_source("a@b/c#val") == ("a@b/c", "val", [])
    (tmp_path / "odd#name@x").mkdir()
    assert parse_source(f"{tmp_path}/odd#name@x") == (f"{tmp_path}/odd#name@x", None, [])
    assert parse_source(f"{tmp_path}/odd#name@x#val@invert") == (
        f"{tmp_path}/odd#name@x",
        "val",
        [Shift("invert", 1)],
    )


def test_a_source_that_is_not_there() -> None:
    with pytest.raises(DataError) as caught:
        open_split("no/such/place")
    assert caught.value.message == "there are no images at no/such/place"
    assert caught.value.hint is not None
    assert "folder of class folders" in caught.value.hint


def test_a_file_that_is_no_data(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"notes\.txt is not a file of images that can be read"):
        open_split(tmp_path / "notes.txt")


def test_a_checkpoint_in_the_place_of_images(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").touch()
    with pytest.raises(DataError, match=r"a\.safetensors is not a file of images") as refusal:
        open_split(tmp_path / "a.safetensors")
    assert str(refusal.value.hint).startswith(
        "it looks like a checkpoint, not like DATA; such files end in .csv"
    )


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no images in class folders"):
        open_split(tmp_path)


def test_everything_that_is_wrong_is_said_at_once(folder: MakeFolder) -> None:
    root = folder(cat=14, dog=2)
    (root / "empty").mkdir()
    for i in range(12):
        (root / "cat" / f"{i}.jpg").write_bytes(b"not an image")
    with pytest.raises(DataError) as caught:
        open_split(root)
    lines = caught.value.message.splitlines()
    assert lines[0] == f"{root}: 13 items cannot be used"
    assert lines[1:3] == ["  class 'empty': no images", "  cat/0.jpg: not an image"]
    assert lines[-1] == "  … and 3 more"
    assert len(lines) == 12
    assert caught.value.hint == "put them right, or leave them out with --skip-bad (skip_bad=True)"


def test_skip_bad_leaves_them_out_and_keeps_the_order_of_classes(folder: MakeFolder) -> None:
    root = folder(cat=3, dog=2)
    (root / "blank").mkdir()
    whole = (root / "cat" / "1.jpg").read_bytes()
    (root / "cat" / "1.jpg").write_bytes(whole[: len(whole) // 2])
    split = open_split(root, skip_bad=True)
    assert split.names == ("cat/0.jpg", "cat/2.jpg", "dog/0.jpg", "dog/1.jpg")
    assert split.classes == ("blank", "cat", "dog")
    assert split.class_subset is not None
    assert split.class_subset.tolist() == [1, 2]
    assert split.labels.tolist() == [1, 1, 2, 2]
    assert len(split.skipped) == 2
    assert split.skipped[0] == "class 'blank': no images"
    assert split.skipped[1].startswith("cat/1.jpg: ")


def test_what_does_not_decode_is_remembered(folder: MakeFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder(cat=3, dog=2)
    whole = (root / "cat" / "1.jpg").read_bytes()
    (root / "cat" / "1.jpg").write_bytes(whole[: len(whole) * 9 // 10])
    names = open_split(root, skip_bad=True).names
    monkeypatch.setattr("clipmerge.data.stored.decode", None)
    assert open_split(root, skip_bad=True).names == names
    assert "cat/1.jpg" not in names
    (root / "cat" / "1.jpg").write_bytes(whole)
    monkeypatch.undo()
    assert len(open_split(root, skip_bad=True)) == 5


def test_nothing_left_is_an_error(folder: MakeFolder) -> None:
    root = folder(cat=1)
    (root / "cat" / "0.jpg").write_bytes(b"")
    with pytest.raises(DataError, match="no image is left to use"):
        open_split(root, skip_bad=True)


def test_the_digest_depends_on_content_and_not_on_the_place(folder: MakeFolder, tmp_path: Path) -> None:
    root = folder(cat=2, dog=2)
    digest = open_split(root).digest
    assert len(digest) == 64
    shutil.copytree(root, tmp_path / "elsewhere")
    assert open_split(tmp_path / "elsewhere").digest == digest
    (tmp_path / "elsewhere" / "cat" / "0.jpg").write_bytes(encoded(picture(99)))
    assert open_split(tmp_path / "elsewhere").digest != digest
    (root / "dog" / "1.jpg").rename(root / "cat" / "9.jpg")
    assert open_split(root).digest != digest


def test_the_digest_of_unchanged_files_is_remembered(
    folder: MakeFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = folder(cat=2, dog=2)
    digest = open_split(root).digest
    monkeypatch.setattr("clipmerge.data.stored.FileImages.fetch", None)
    assert open_split(root).digest == digest


def test_a_digest_of_known_content(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 4, 4), np.uint8), labels=[0, 1], classes=["x", "y"])
    assert open_split(tmp_path / "a.npz").digest[:16] == "b471e18cd51ecfd5"


def test_a_subset_keeps_what_belongs_together(folder: MakeFolder) -> None:
    split = open_split(folder(cat=3, dog=2))
    some = split.subset([4, 1])
    assert some.names == ("dog/1.jpg", "cat/1.jpg")
    assert some.labels.tolist() == [1, 0]
    assert some.read_bytes(0) == split.read_bytes(4)
    assert len(some) == 2
    assert np.array_equal(some.keys, split.keys[[4, 1]])


def test_decoding_is_pillows_convert() -> None:
    assert np.array_equal(np.asarray(decode(encoded(picture(3), "PNG"))), np.asarray(picture(3)))


def test_images_in_folders_of_a_class_folder_come_in_the_order_of_paths(folder: MakeFolder) -> None:
    root = folder(cat=1, dog=1)
    for place in ("a-b", "a"):
        (root / "cat" / place).mkdir()
        picture(5).save(root / "cat" / place / "x.jpg")
    assert open_split(root).names == ("cat/0.jpg", "cat/a/x.jpg", "cat/a-b/x.jpg", "dog/0.jpg")


def ppm(seed: int) -> bytes:
    """An image whose bytes no version of an encoder decides."""
    return b"P6 4 3 255\n" + bytes((seed * 37 + 11 * i) % 256 for i in range(36))


@pytest.fixture
def known(tmp_path: Path) -> Path:
    for i, name in enumerate(("cat/0.ppm", "cat/1.ppm", "dog/0.ppm")):
        path = tmp_path / "f" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(ppm((0, 1, 5)[i]))
    rows = ("path,label,class_name,group,caption", "cat/0.ppm,0,Cat,day,a cat", "dog/0.ppm,1,Dog,night,a dog")
    (tmp_path / "f" / "t.csv").write_text("\n".join(rows))
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        for name, data in (("s.png", ppm(1)), ("s.cls", b"0")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    offsets = np.cumsum([0, len(ppm(1)), len(ppm(2))])
    blob = np.frombuffer(ppm(1) + ppm(2), np.uint8)
    np.savez(tmp_path / "e.npz", blob=blob, offsets=offsets, labels=[0, 1])
    return tmp_path


@pytest.mark.parametrize(
    ("source", "digest"),
    [
        ("f", "96b730e80400a710"),
        ("f/t.csv", "d02bef1a9fa39688"),
        ("t.tar", "e33a68f6f1b60304"),
        ("e.npz", "b566437ec0892848"),
        ("f@invert@noise:0.1", "35d15ca9b3ade7f1"),
    ],
)
def test_digests_never_change_because_journals_and_caches_are_filed_under_them(
    known: Path, source: str, digest: str
) -> None:
    assert open_split(known / source).digest[:16] == digest


def test_digests_of_the_digits_never_change_either() -> None:
    assert open_split("digits#val").digest[:16] == "450fcd8dc538890b"
    assert open_split("digits#test@rotate:20").digest[:16] == "197261e5159dca5b"
