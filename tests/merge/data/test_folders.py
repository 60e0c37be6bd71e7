"""Folders as people have them: read as they are meant, or refused with the way."""

from pathlib import Path

import numpy as np
import pytest

from clipmerge.data.open import open_split
from clipmerge.data.split import shared_images
from clipmerge.errors import DataError

from .conftest import MakeFolder, picture


def tree(root: Path, *places: str) -> Path:
    """Write an image, or a file of text, to each place."""
    for i, place in enumerate(places):
        path = root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".png", ".jpg"):
            picture(i, 8, 6).save(path)
        else:
            path.write_text("x")
    return root


TINY = [
    *(
        f"train/{wnid}/images/{wnid}_{i}.jpg"
        for wnid in ("n01443537", "n01629819", "n01882714")
        for i in range(2)
    ),
    *(f"train/{wnid}/{wnid}_boxes.txt" for wnid in ("n01443537", "n01629819", "n01882714")),
    *(f"val/images/val_{i}.jpg" for i in range(3)),
    *(f"test/images/test_{i}.jpg" for i in range(3)),
]


@pytest.fixture
def tiny_imagenet(tmp_path: Path) -> Path:
    root = tree(tmp_path / "tiny", *TINY)
    rows = [("val_0.jpg", "n01882714"), ("val_1.jpg", "n01443537"), ("val_2.jpg", "n01629819")]
    lines = "".join(f"{name}\t{wnid}\t0\t0\t9\t9\n" for name, wnid in rows)
    (root / "val" / "val_annotations.txt").write_text(lines)
    return root


def test_tiny_imagenet_is_read_as_its_authors_do(tiny_imagenet: Path) -> None:
    val = open_split(tiny_imagenet, role="val")
    assert [val.classes[label] for label in val.labels] == ["koala", "goldfish", "fire salamander"]
    train = open_split(f"{tiny_imagenet}#train")
    assert [train.classes[i] for i in train.labels] == ["goldfish"] * 2 + ["fire salamander"] * 2 + [
        "koala"
    ] * 2
    assert (train.remarks, train.choices, train.part) == ((), 3, "train")


def test_a_test_part_without_labels_is_never_one_class(tiny_imagenet: Path) -> None:
    test = open_split(tiny_imagenet)
    assert (test.part, len(test)) == ("val", 3)
    assert test.remarks == ("its test images are in one folder, not in classes, so val is taken",)
    asked = open_split(f"{tiny_imagenet}#test")
    assert asked.remarks == ("its only class is 'images', so no score can follow: any model is right",)


def test_a_part_with_one_class_is_not_replaced_by_train(tmp_path: Path) -> None:
    root = tree(tmp_path / "s", "train/cat/0.png", "train/dog/0.png", "val/cat/0.png")
    assert open_split(root, role="val").part == "val"


def test_images_that_the_list_lacks_are_named(tiny_imagenet: Path) -> None:
    tree(tiny_imagenet, "val/images/val_7.jpg")
    (tiny_imagenet / "val" / "images" / "val_2.jpg").unlink()
    with pytest.raises(DataError) as caught:
        open_split(f"{tiny_imagenet}#val")
    assert caught.value.message.splitlines()[1:] == [
        "  images/val_7.jpg: not in val_annotations.txt",
        "  val_2.jpg: in val_annotations.txt, but no such file",
    ]
    assert len(open_split(f"{tiny_imagenet}#val", skip_bad=True)) == 2


@pytest.mark.parametrize(
    ("places", "hint"),
    [
        (["data/cat/0.png", "data/dog/0.png"], "data"),
        (["clipart/cat/0.png", "clipart/dog/0.png", "sketch/cat/0.png", "sketch/dog/0.png"], "clipart"),
        (["clipart/cat/0.png", "clipart/dog/0.png", "sketch/cat/0.png"], "clipart"),
        (["amazon/images/mug/0.png", "amazon/images/pen/0.png", "dslr/images/mug/0.png"], "amazon"),
        (["noise/gauss/1/cat/0.png", "blur/motion/1/cat/0.png"], "blur"),
    ],
)
def test_class_folders_that_hold_only_folders_are_refused_with_the_way(
    places: list[str], hint: str, tmp_path: Path
) -> None:
    root = tree(tmp_path / "s", *places)
    with pytest.raises(DataError, match="holds only folders") as caught:
        open_split(root)
    assert f"perhaps {root / hint};" in str(caught.value.hint)


def test_folders_inside_classes_are_fine_where_nothing_else_could_be_meant(tmp_path: Path) -> None:
    split = open_split(tree(tmp_path / "a", "cat/x/0.png", "cat/1.png", "dog/2.png"))
    assert (split.labels.tolist(), split.remarks) == ([0, 0, 1], ())
    clips = open_split(tree(tmp_path / "b", "run/clip1/0.png", "run/clip2/0.png", "jump/clip3/0.png"))
    assert clips.classes == ("jump", "run")
    assert clips.remarks == ("2 of its class folders hold only folders: jump (clip3) is one class",)


@pytest.mark.parametrize("names", [("train", "test"), ("Train", "Val"), ("train2017", "val2017")])
def test_parts_are_no_classes(names: tuple[str, str], tmp_path: Path) -> None:
    flat = tree(tmp_path / "flat", *(f"{name}/{i}.png" for name in names for i in range(2)))
    with pytest.raises(DataError, match="with images in them, and no class folders"):
        open_split(flat)
    root = tree(tmp_path / "s", *(f"{name}/{c}/0.png" for name in names for c in ("cat", "dog")))
    assert open_split(f"{root}#{names[0].lower()}").classes == ("cat", "dog")
    assert open_split(f"{root}#{names[0]}").part == names[0]
    assert open_split(root, role="train").part == names[0]


def test_one_class_is_remarked(folder: MakeFolder) -> None:
    (remark,) = open_split(folder(cat=3)).remarks
    assert remark == "its only class is 'cat', so no score can follow: any model is right"


def test_one_stray_file_decides_nothing(tmp_path: Path) -> None:
    root = tree(tmp_path / "s", *(f"{c}/{i}.png" for c in ("cat", "dog") for i in range(2)))
    for stray in ("images.tar", "cat/old.tar.gz", "table.parquet", "__MACOSX/cat/._0.png", "metadata.csv"):
        tree(root, stray)
    split = open_split(root)
    assert split.classes == ("cat", "dog")
    assert split.remarks == ("most of it is images in folders; passed over cat/old.tar.gz, images.tar",)


def test_files_that_are_passed_over_are_counted(tmp_path: Path) -> None:
    root = tree(
        tmp_path / "s",
        "cat/0.png",
        "dog/0.png",
        "cat/1.heic",
        "dog/1.heic",
        "dog/2",
        "cat/list.txt",
        "cover.png",
    )
    assert open_split(root).remarks == (
        "passed over 1 images beside its class folders: cover.png is in no class",
        "passed over 3 files that are no images by their names: .heic (2), no suffix (1)",
    )


def test_images_of_many_suffixes_are_images(tmp_path: Path) -> None:
    root = tmp_path / "s"
    for i, suffix in enumerate(
        (".jpg", ".JPEG", ".jfif", ".png", ".TIF", ".bmp", ".jp2", ".tga", ".ppm", ".webp")
    ):
        (root / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        kind = {".jfif": "JPEG", ".jpg": "JPEG", ".TIF": "TIFF", ".jp2": "JPEG2000"}.get(
            suffix, suffix[1:].upper()
        )
        picture(i).save(root / "ab"[i % 2] / f"{i}{suffix}", kind)
    split = open_split(root)
    assert (len(split), split.remarks) == (10, ())
    assert all(np.asarray(split.image(i)).shape == (30, 40, 3) for i in range(10))


def test_images_that_are_there_twice_are_counted_and_said(tmp_path: Path) -> None:
    root = tree(tmp_path / "s", "cat/0.png", "cat/1.png", "dog/0.png")
    for copy in ("cat/copy.png", "dog/copy.png"):
        (root / copy).write_bytes((root / "cat" / "0.png").read_bytes())
    split = open_split(root)
    assert [(split.names[i], split.names[j]) for i, j in split.duplicates] == [
        ("cat/copy.png", "cat/0.png"),
        ("dog/copy.png", "cat/0.png"),
    ]
    assert split.remarks == (
        "2 images have the content of another, 1 of them with another class: cat/copy.png is cat/0.png",
    )
    assert len(open_split("digits#val").duplicates) == 0
    lines = ("path,label", "s/cat/0.png,cat", "s/cat/1.png,cat", "s/cat/0.png,dog")
    (tmp_path / "t.csv").write_text("\n".join(lines))
    assert [remark[:57] for remark in open_split(tmp_path / "t.csv").remarks] == [
        "1 image has the content of another, 1 of them with another"[:57]
    ]


def test_a_single_class_folder_names_the_one_above_it(tmp_path: Path) -> None:
    tree(tmp_path / "images", "cat/1.jpg", "dog/2.jpg", "dog/3.jpg")
    with pytest.raises(DataError, match="dog holds no images in class folders") as refusal:
        open_split(tmp_path / "images" / "dog")
    assert refusal.value.hint == f"if dog is one class of 2, name the folder above it: {tmp_path / 'images'}"


def test_images_in_two_sets_are_counted(tmp_path: Path) -> None:
    tree(tmp_path / "a", "cat/0.jpg", "cat/1.jpg", "dog/2.jpg")
    tree(tmp_path / "b", "dog/0.jpg", "cat/1.jpg", "dog/2.txt", "dog/3.jpg")  # the first two as in a
    splits = {"train": open_split(tmp_path / "a"), "val": open_split(tmp_path / "b")}
    assert shared_images(splits) == ["2 of val's 3 images are in train too"]
    turned = {"val": splits["val"], "shift": open_split(f"{tmp_path}/b@rotate:20")}
    assert shared_images(turned) == []
    assert shared_images({"val": splits["val"]}) == []


def test_names_that_only_case_or_spaces_tell_apart_are_remarked(tmp_path: Path) -> None:
    split = open_split(
        tree(tmp_path, "Cat/1.jpg", "cat/2.jpg", "ice_cream/3.jpg", "ice cream/4.jpg", "ox/5.jpg")
    )
    assert split.choices == 5
    (remark,) = split.remarks
    assert remark.startswith("classes that differ in case or spaces only")
    assert "'Cat', 'cat'" in remark
    assert "'ox'" not in remark


def test_folders_without_classes_beside_others_are_no_class(tmp_path: Path) -> None:
    tree(tmp_path / "data", "flat/1.jpg", "notes/a.txt", "train/cat/1.jpg")
    with pytest.raises(DataError, match="holds no images in class folders") as refusal:
        open_split(tmp_path / "data" / "flat")
    assert str(refusal.value.hint).startswith("put them where ")
