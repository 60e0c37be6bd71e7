"""Class names: from the data, from a file, or ImageNet's."""

import json
from pathlib import Path

import pytest

from clipmerge.data.classes import imagenet_names
from clipmerge.data.split import open_split
from clipmerge.errors import DataError

from .conftest import MakeFolder


def test_wordnet_ids_are_imagenets_classes(folder: MakeFolder) -> None:
    split = open_split(folder(n01498041=1, n01443537=2))
    assert len(split.classes) == 1000
    assert split.classes == imagenet_names()
    assert [split.classes[label] for label in split.labels] == ["goldfish", "goldfish", "stingray"]
    assert split.labels.tolist() == [1, 1, 6]
    assert split.class_subset is not None
    assert split.class_subset.tolist() == [1, 6]


def test_wordnet_ids_outside_imagenet_1k_are_refused_beside_those_inside(folder: MakeFolder) -> None:
    root = folder(n01443537=1, n00000001=1)
    with pytest.raises(DataError, match="class 'n00000001': not among the class names"):
        open_split(root)
    assert open_split(root, skip_bad=True).names == ("n01443537/0.jpg",)


def test_wordnet_ids_that_are_none_of_imagenet_1k_get_wordnets_names(folder: MakeFolder) -> None:
    split = open_split(folder(n00007846=1, n00288000=1))
    assert split.classes == ("person", "dressage")


def test_names_from_a_file_are_matched_blind_to_case_and_underscores(
    folder: MakeFolder, tmp_path: Path
) -> None:
    (tmp_path / "names.txt").write_text("Red Fox\nowl\nhouse cat\n")
    split = open_split(folder(house_cat=1, red_fox=1), classnames=tmp_path / "names.txt")
    assert split.classes == ("Red Fox", "owl", "house cat")
    assert split.labels.tolist() == [2, 0]
    assert split.class_subset is not None
    assert split.class_subset.tolist() == [0, 2]


def test_names_stand_for_folders_in_order_where_none_matches(folder: MakeFolder) -> None:
    split = open_split(folder(a=1, b=1), classnames=["apple", "banana"])
    assert (split.classes, split.labels.tolist()) == (("apple", "banana"), [0, 1])


def test_folders_that_are_numbers_are_indices(folder: MakeFolder, tmp_path: Path) -> None:
    root = folder(**{"0": 1, "2": 1, "10": 1})
    (tmp_path / "names.json").write_text(json.dumps([f"thing {i}" for i in range(12)]))
    assert sorted(open_split(root, classnames=tmp_path / "names.json").labels) == [0, 2, 10]
    assert len(open_split(root).classes) == 11


def test_unknown_names_are_all_named(folder: MakeFolder) -> None:
    root = folder(red_fox=1, dgo=1)
    with pytest.raises(DataError) as caught:
        open_split(root, classnames=["red fox", "dog", "owl"])
    assert caught.value.message.splitlines()[1:] == [
        "  class 'dgo': not among the class names (did you mean 'dog'?)"
    ]
    kept = open_split(root, classnames=["red fox", "dog", "owl"], skip_bad=True)
    assert (kept.names, kept.labels.tolist()) == (("red_fox/0.jpg",), [0])


def test_imagenets_names_for_folders_of_names(folder: MakeFolder) -> None:
    split = open_split(folder(goldfish=1, Great_White_Shark=1), classnames="imagenet")
    assert split.labels.tolist() == [2, 1]
    assert len(split.classes) == 1000


@pytest.mark.parametrize(
    ("text", "problem"),
    [("", "holds no names"), ("cat\ndog\ncat\n", "names 'cat' twice"), ("[1,", "is not a JSON list")],
)
def test_a_file_of_names_that_is_wrong(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(DataError, match=problem):
        open_split("digits", classnames=tmp_path / "names.txt")


def test_no_file_of_names() -> None:
    with pytest.raises(DataError) as caught:
        open_split("digits", classnames="nowhere.txt")
    assert caught.value.message == "class names cannot be read from nowhere.txt: No such file or directory"
    assert caught.value.hint is not None
    assert "imagenet" in caught.value.hint
