"""Class names: from the data, from a file, or ImageNet's."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from clipmerge.data.classes import imagenet_names
from clipmerge.data.open import open_split
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
        "  class 'dgo': not among the class names (did you mean dog?)"
    ]
    kept = open_split(root, classnames=["red fox", "dog", "owl"], skip_bad=True)
    assert (kept.names, kept.labels.tolist()) == (("red_fox/0.jpg",), [0])


def test_imagenets_names_for_folders_of_names(folder: MakeFolder) -> None:
    split = open_split(folder(goldfish=1, Great_White_Shark=1), classnames="imagenet")
    assert split.labels.tolist() == [2, 1]
    assert len(split.classes) == 1000


def test_words_by_a_table_that_names_several_classes_of_imagenet(folder: MakeFolder, tmp_path: Path) -> None:
    table = {"alarm_clock": ["analog clock", "digital clock"], "tench": "tench", "unused": "goldfish"}
    (tmp_path / "names.json").write_text(json.dumps(table))
    split = open_split(folder(tench=1, alarm_clock=2), classnames=tmp_path / "names.json")
    assert split.labels.tolist() == [409, 409, 0]
    assert split.class_subset is not None
    assert split.class_subset.tolist() == [0, 409, 530]
    assert split.counts_as is not None
    assert split.counts_as.tolist() == [0, 409, 409]
    logits = torch.zeros(1, 1000)
    logits[0, [1, 409, 530]] = torch.tensor([9.0, 1.0, 3.0])
    scored = split.covered(logits)
    assert scored[0, [0, 409]].tolist() == [0.0, 3.0]
    assert scored.isfinite().sum() == 2


def test_words_by_a_table_of_other_names(folder: MakeFolder) -> None:
    split = open_split(folder(a=1, b=1), classnames={"a": "great ape", "b": "bee", "c": "sea"})
    assert (split.classes, split.labels.tolist()) == (("great ape", "bee", "sea"), [0, 1])
    assert split.class_subset is not None
    assert split.class_subset.tolist() == [0, 1]
    numbered = open_split("digits#val", classnames={str(i): f"figure {i}" for i in range(10)})
    assert numbered.classes[7] == "figure 7"
    assert np.array_equal(numbered.labels, open_split("digits#val").labels)


def test_words_that_the_table_lacks_or_confuses(folder: MakeFolder) -> None:
    root = folder(a=1, b=1)
    with pytest.raises(DataError, match="class 'b': not among the class names"):
        open_split(root, classnames={"a": "ape"})
    with pytest.raises(DataError, match="class name 'ape' is listed for both 'a' and 'b'"):
        open_split(root, classnames={"a": ["ape"], "b": ["bee", "ape"]})


def test_uncovered_classes_are_hidden_and_a_full_split_hides_none(folder: MakeFolder) -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0]])
    some = open_split(folder(a=1, b=1), classnames=["c", "b", "a"])
    assert some.covered(logits).tolist() == [[-torch.inf, 1.0, 2.0]]
    assert open_split("digits#val").covered(logits) is logits
    with torch.inference_mode():
        split = open_split(some.source, classnames=["c", "b", "a"])
        split.covered(logits)
    trained = torch.tensor([[3.0, 1.0, 2.0]], requires_grad=True)
    split.covered(trained).softmax(-1)[0, 1].backward()
    assert trained.grad is not None
    assert trained.grad[0, 0] == 0


@pytest.mark.parametrize(
    ("text", "problem"),
    [("", "holds no names"), ("cat\ndog\ncat\n", "names 'cat' twice"), ("[1,", "is not JSON")],
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
