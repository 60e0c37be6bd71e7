"""Labels and class names mean the same in every kind of source; nothing is guessed from the order of texts."""

import json
from pathlib import Path

import numpy as np
import pytest

from clipmerge.data.classes import class_words, imagenet_names
from clipmerge.data.open import open_split
from clipmerge.errors import DataError
from clipmerge.text import natural

from .conftest import KINDS, MakeFolder, picture, store

MANY = 12
NAMES = [f"thing number {chr(97 + i)}" for i in range(MANY)]
every_kind = pytest.mark.parametrize("kind", KINDS)


def named(split) -> list[str]:
    return [split.classes[label] for label in split.labels]


# --- numbers


@every_kind
@pytest.mark.parametrize("form", ["{}", "{}.0", "{:03d}"])
def test_a_label_that_is_a_number_is_an_index(kind: str, form: str, tmp_path: Path) -> None:
    source = store(kind, tmp_path / "s", [form.format(i) for i in range(MANY)])
    split = open_split(source, classnames=NAMES)
    order = (
        sorted(range(MANY), key=lambda i: split.names[i].rpartition("/")[2])
        if kind == "folder"
        else range(MANY)
    )
    assert split.labels[list(order)].tolist() == list(range(MANY))
    assert split.classes == tuple(NAMES)


@pytest.mark.parametrize("kind", ["npz", "parquet"])
def test_whole_floats_are_numbers_and_halves_are_refused(kind: str, tmp_path: Path) -> None:
    split = open_split(store(kind, tmp_path / "s", [float(i) for i in range(MANY)]), classnames=NAMES)
    assert split.labels.tolist() == list(range(MANY))
    with pytest.raises(DataError):
        open_split(store(kind, tmp_path / "h", [0.5, 1.0, 2.0, 0.0]), classnames=NAMES[:3])


@every_kind
@pytest.mark.parametrize("skip_bad", [False, True])
@pytest.mark.parametrize("names", ["none", "given"])
def test_labels_that_start_at_1_are_refused_and_never_shifted(
    kind: str, skip_bad: bool, names: str, tmp_path: Path
) -> None:
    source = store(kind, tmp_path / "s", list(range(1, MANY + 1)))
    with pytest.raises(DataError, match="labels start at 1") as caught:
        open_split(source, classnames=NAMES if names == "given" else None, skip_bad=skip_bad)
    assert "JSON object" in str(caught.value.hint)
    told = open_split(
        source, classnames={str(i + 1): name for i, name in enumerate(NAMES)}, skip_bad=skip_bad
    )
    assert sorted(named(told)) == NAMES


@pytest.mark.parametrize("kind", ["npz", "webdataset", "parquet"])
@pytest.mark.parametrize("skip_bad", [False, True])
def test_labels_that_start_at_1_beside_declared_names(kind: str, skip_bad: bool, tmp_path: Path) -> None:
    source = store(kind, tmp_path / "s", list(range(1, MANY + 1)), NAMES)
    with pytest.raises(DataError, match="labels start at 1"):
        open_split(source, skip_bad=skip_bad)


def test_a_head_with_a_class_more_may_have_no_image_of_the_first_but_it_is_said(tmp_path: Path) -> None:
    split = open_split(store("csv", tmp_path, [1, 2, 1]), classnames=["background", "cat", "dog", "owl"])
    assert named(split) == ["cat", "dog", "cat"]
    assert split.remarks == ("no image has label 0 (background): do its labels start at 1?",)


@every_kind
def test_ids_are_no_indices(kind: str, tmp_path: Path) -> None:
    source = store(kind, tmp_path / "s", [20240115, 0, 10**15])
    with pytest.raises(DataError, match="label 1000000000000000 cannot be an index"):
        open_split(source)
    names = {"0": "a", "20240115": "b", str(10**15): "c"}
    assert sorted(named(open_split(source, classnames=names))) == ["a", "b", "c"]


@every_kind
def test_one_class_is_remarked_and_images_that_are_there_twice_are_counted(kind: str, tmp_path: Path) -> None:
    same = [picture(0, 8, 6), picture(1, 8, 6), picture(0, 8, 6)]
    split = open_split(store(kind, tmp_path / "s", ["cat"] * 3, images=same))
    assert split.choices == 1
    assert split.remarks[0] == "its only class is 'cat', so no score can follow: any model is right"
    assert split.remarks[1].startswith("1 image has the content of another: ")
    assert len(split.duplicates) == 1


@every_kind
def test_numbers_without_names_are_remarked(kind: str, tmp_path: Path) -> None:
    (remark,) = open_split(store(kind, tmp_path / "s", list(range(MANY)))).remarks
    assert remark.startswith("its classes have no names but numbers, 0 … 11")
    assert open_split("digits").remarks == (), "the digits say what they are called"


@pytest.mark.parametrize("kind", ["csv", "npz", "webdataset", "parquet"])
def test_a_label_that_is_no_number_among_numbers_is_named_and_shifts_nothing(
    kind: str, tmp_path: Path
) -> None:
    source = store(kind, tmp_path / "s", ["0", "1", "x", "2", "2"])
    with pytest.raises(DataError, match="label 'x' is not a number, as others are"):
        open_split(source, classnames=NAMES[:3])
    assert open_split(source, classnames=NAMES[:3], skip_bad=True).labels.tolist() == [0, 1, 2, 2]


def test_a_missing_label_is_no_class_of_its_own(tmp_path: Path) -> None:
    source = store("parquet", tmp_path, ["cat", None, "dog"])  # type: ignore[list-item]
    with pytest.raises(DataError, match="row 000001: no label"):
        open_split(source)
    split = open_split(source, skip_bad=True)
    assert (split.classes, split.labels.tolist()) == (("cat", "dog"), [0, 1])


# --- words


@every_kind
def test_words_with_numbers_count_as_people_count(kind: str, tmp_path: Path) -> None:
    source = store(kind, tmp_path / "s", [f"class_{i}" for i in range(MANY)])
    unnamed = open_split(source)
    assert unnamed.classes == tuple(f"class {i}" for i in range(MANY))
    assert unnamed.remarks == (
        "only a number tells its classes apart, class 0 … class 11; prompts need words: give --classnames",
    )
    split = open_split(source, classnames=NAMES)
    assert [int(np.flatnonzero(np.array(NAMES) == name)[0]) for name in sorted(named(split))] == list(
        range(MANY)
    )
    of_ten = split.labels[[i for i, name in enumerate(split.names) if open_split(source).labels[i] == 10]]
    assert of_ten.tolist() == [10], "class_10 is the name at 10, not the one after class_1"
    assert split.remarks == (
        "class names are taken in the order of the classes: "
        "class_0 is 'thing number a', class_1 is 'thing number b' … class_11 is 'thing number l'",
    )


@pytest.mark.parametrize("kind", ["npz", "webdataset", "parquet"])
def test_given_names_are_matched_with_declared_ones_whatever_their_order(kind: str, tmp_path: Path) -> None:
    source = store(kind, tmp_path / "s", [0, 1, 2], ["cat", "sea_lion", "owl"])
    assert named(open_split(source, classnames=["Sea Lion", "owl", "cat"])) == ["cat", "Sea Lion", "owl"]
    renamed = open_split(source, classnames=["a cat", "a seal", "an owl"])
    assert named(renamed) == ["a cat", "a seal", "an owl"]
    assert renamed.remarks[0].startswith("class names are taken in the order of the classes: cat is 'a cat'")
    assert named(open_split(source, classnames={"cat": "x", "owl": "y", "sea_lion": "z"})) == ["x", "z", "y"]
    with pytest.raises(DataError, match="its class, 'owl', is not among the class names"):
        open_split(source, classnames=["cat", "sea lion", "dog"])
    with pytest.raises(DataError, match="not among the class names"):
        open_split(source, classnames=["w", "x", "y", "z"])


def test_names_for_torchvisions_folders_are_not_paired_by_the_order_of_texts(tmp_path: Path) -> None:
    source = f"torchvision:ImageFolder:{store('folder', tmp_path / 's', [f'class_{i}' for i in range(MANY)])}"
    with pytest.raises(DataError, match="their order is not clear: class_0, class_1, class_10"):
        open_split(source, classnames=NAMES)
    told = open_split(source, classnames={f"class_{i}": name for i, name in enumerate(NAMES)})
    assert [int(name == NAMES[10]) for name in named(told)] == [0, 0, 1, *[0] * 9], (
        "class_10 is the third folder"
    )


def test_an_order_that_is_not_clear_is_refused(tmp_path: Path) -> None:
    source = store("folder", tmp_path, ["v2", "v10", "w"])
    with pytest.raises(DataError, match="their order is not clear: v2, v10, w") as caught:
        open_split(source, classnames=["a", "b", "c"])
    assert "JSON object" in str(caught.value.hint)


@every_kind
def test_skip_bad_never_shifts_names(kind: str, tmp_path: Path) -> None:
    """Whatever is left out, an image keeps its own class's name."""
    words = ["ape", "bee", "cow", "dog"]
    source = store(kind, tmp_path / "s", ["bee", "cow", "dog", "dog"])
    with pytest.raises(DataError):
        open_split(source, classnames=["x1", "x2", "x3", "x4"], skip_bad=True)
    split = open_split(source, classnames=words, skip_bad=True)
    assert sorted(named(split)) == ["bee", "cow", "dog", "dog"]
    some = open_split(source, classnames=["ape", "cow", "dog"], skip_bad=True)
    assert sorted(named(some)) == ["cow", "dog", "dog"]
    assert any("'bee'" in text for text in some.skipped)


@pytest.mark.parametrize("kind", ["npz", "webdataset"])
def test_words_are_matched_with_declared_names_and_none_is_lost(kind: str, tmp_path: Path) -> None:
    source = store(kind, tmp_path / "s", ["sea_lion", "Cat", "cat"], None)
    if kind == "webdataset":
        (source / "classnames.txt").write_text("cat\nsea lion\n")
    else:
        arrays = dict(np.load(source))
        np.savez(source, **arrays, classes=["cat", "sea lion"])
    split = open_split(source)
    assert (split.classes, split.labels.tolist()) == (("cat", "sea lion"), [1, 0, 0])


def test_an_empty_line_between_names_is_refused(tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("cat\n\nowl\n")
    with pytest.raises(DataError, match="line 2 is empty, and a line's place is its label"):
        open_split("digits", classnames=tmp_path / "names.txt")
    source = store("webdataset", tmp_path / "s", [0, 1, 2], ["cat", "", "owl"])
    with pytest.raises(DataError, match="line 2 is empty"):
        open_split(source)


def test_two_names_of_one_number_are_refused(folder: MakeFolder) -> None:
    root = folder(cat=2, dog=1)
    (root / "t.csv").write_text("path,label,class_name\ncat/0.jpg,0,cat\ncat/1.jpg,0,dog\ndog/0.jpg,1,dog\n")
    with pytest.raises(DataError, match="label 0 is named both cat and dog"):
        open_split(root / "t.csv")


def test_names_in_a_column_need_no_numbers_from_0(folder: MakeFolder) -> None:
    """Each row says its name, so that nothing hangs on where numbers start."""
    root = folder(cat=1, dog=1)
    (root / "t.csv").write_text("path,label,class_name\ndog/0.jpg,10,dog\ncat/0.jpg,2,cat\n")
    split = open_split(root / "t.csv")
    assert (split.classes, split.labels.tolist()) == (("cat", "dog"), [1, 0])


@pytest.mark.parametrize("kind", ["npz", "webdataset", "parquet"])
def test_declared_wordnet_ids_are_imagenets_classes(kind: str, tmp_path: Path) -> None:
    split = open_split(store(kind, tmp_path / "s", [1, 0], ["n01443537", "n01498041"]))
    assert named(split) == ["stingray", "goldfish"]
    assert split.classes == imagenet_names()


def test_torchvisions_imagenet_has_the_names_that_clip_is_prompted_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import torchvision.datasets as known

    class Four(known.VisionDataset):
        wnids = ("n01440764", "n01443537")
        classes = (("tench", "Tinca tinca"), ("goldfish", "Carassius auratus"))
        targets = (1, 0)

        def __getitem__(self, i: int) -> object:
            return picture(i), self.targets[i]

    monkeypatch.setattr(known, "ImageNet", Four)
    split = open_split(f"torchvision:ImageNet:{tmp_path}")
    assert split.classes == imagenet_names()
    assert named(split) == ["goldfish", "tench"]


def test_imagenets_names_for_folders_of_ids(folder: MakeFolder) -> None:
    assert named(open_split(folder(n01498041=1, n01443537=1), classnames="imagenet")) == [
        "goldfish",
        "stingray",
    ]


# --- the rule that makes words


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["house_cat", "dog"], ["house cat", "dog"]),
        (
            ["001.Black_footed_Albatross", "002.Laysan_Albatross"],
            ["Black footed Albatross", "Laysan Albatross"],
        ),
        (["0 - zero", "1 - one"], ["zero", "one"]),
        (["AnnualCrop", "Forest", "SeaLake"], ["Annual Crop", "Forest", "Sea Lake"]),
        (["Tomato___Late_blight", "Tomato___healthy"], ["Tomato Late blight", "Tomato healthy"]),
        (["18-wheeler", "van"], ["18-wheeler", "van"]),
        (["707-320", "727-200"], ["707-320", "727-200"]),
        (["YouTube", "Star bucks"], ["YouTube", "Star bucks"]),
        (["iPod", "McDonalds", "T-shirt", "A300B4"], ["iPod", "McDonalds", "T-shirt", "A300B4"]),
        (["1.cat", "2.cat"], ["1.cat", "2.cat"]),
        (["sea_lion", "sea lion"], ["sea_lion", "sea lion"]),
        (["0", "1", "10"], ["0", "1", "10"]),
        (["3d_printer"], ["3d printer"]),
    ],
)
def test_one_rule_makes_words(names: list[str], words: list[str]) -> None:
    assert class_words(names) == tuple(words)
    assert class_words(words) == tuple(words), "words stay as they are"


def test_the_rule_leaves_names_that_people_wrote() -> None:
    assert class_words(imagenet_names()) == imagenet_names()


@every_kind
@pytest.mark.parametrize(
    "names", [["sea_lion", "house_cat"], ["AnnualCrop", "SeaLake"], ["01_cat", "02_sea_lion"]]
)
def test_every_source_uses_it(kind: str, names: list[str], tmp_path: Path) -> None:
    labels = [0, 1, 1]
    words = class_words(names)
    declared = open_split(store(kind, tmp_path / "d", labels, names))
    said = open_split(store(kind, tmp_path / "w", [names[label] for label in labels]))
    for split in (declared, said):
        assert sorted(named(split)) == sorted(words[label] for label in labels)
    given = open_split(store(kind, tmp_path / "w", [names[label] for label in labels]), classnames=names)
    assert set(given.classes) == set(names), "the user's names are taken as they are"


def test_numbers_sort_as_numbers() -> None:
    assert sorted(["b", "a10", "a2", "a", "a2b", "a02"], key=natural) == ["a", "a02", "a2", "a2b", "a10", "b"]
    assert json.dumps(sorted("cba", key=natural)) == '["a", "b", "c"]'


@pytest.mark.parametrize(
    ("nothing", "hint"), [("", "is a variable of the shell unset?"), (" ", "is a variable")]
)
def test_an_empty_name_is_not_the_folder_here(nothing: str, hint: str) -> None:
    with pytest.raises(DataError, match="the name of the images is empty") as refusal:
        open_split(nothing)
    assert str(refusal.value.hint).startswith(hint)


def test_a_pattern_is_named_as_one(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there are no images at .*\*\.tar") as refusal:
        open_split(f"{tmp_path}/*.tar")
    assert "patterns are not expanded" in str(refusal.value.hint)


def test_tables_with_an_old_macs_lines_and_missing_labels(tmp_path: Path) -> None:
    for i in range(3):
        picture(i, 8, 6).save(tmp_path / f"{i}.png")
    table = tmp_path / "images.csv"
    table.write_bytes(b"filepath,label\r0.png,cat\r1.png,dog\r")
    split = open_split(table)
    assert [split.classes[i] for i in split.labels] == ["cat", "dog"]
    table.write_text("filepath,label\n0.png,cat\n1.png,dog\n2.png,NaN\n")
    with pytest.raises(DataError, match=r"line 4: no label"):
        open_split(table)


def test_labels_that_are_kept_back_and_arrays_of_other_names_are_said(tmp_path: Path) -> None:
    images = np.zeros((2, 4, 4, 3), np.uint8)
    np.savez(tmp_path / "a.npz", images=images, labels=np.array([-1, -1]))
    with pytest.raises(DataError, match="label -1: no label of the data is a class"):
        open_split(tmp_path / "a.npz")
    np.savez(tmp_path / "b.npz", x_train=images, y_train=np.array([0, 1]))
    with pytest.raises(DataError, match="has no labels, or no images: it holds x_train, y_train"):
        open_split(tmp_path / "b.npz")
