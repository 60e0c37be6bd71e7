"""What is held out, limited and drawn is decided by hashes of names."""

import numpy as np
import pytest
from blake3 import blake3

from clipmerge.data.open import open_split
from clipmerge.data.sampling import few_shot, fraction_of, held_out
from clipmerge.errors import DataError

from .conftest import MakeFolder


def test_held_out_items_are_those_with_low_hashes() -> None:
    names = [f"n{i}" for i in range(1000)]
    hashes = [int.from_bytes(blake3(f"holdout\0{n}".encode()).digest()[:8], "big") / 2**64 for n in names]
    chosen = held_out(names, 0.1)
    assert chosen.tolist() == [h < 0.1 for h in hashes]
    assert 70 < chosen.sum() < 130
    assert set(np.flatnonzero(held_out(names, 0.02))) <= set(np.flatnonzero(chosen)), (
        "a larger part holds a smaller"
    )


def test_holdout_and_rest_are_the_training_images() -> None:
    held = open_split("digits", holdout="10%")
    rest = open_split("digits", holdout=0.1, keep="rest")
    train = open_split("digits#train")
    assert sorted([*held.names, *rest.names]) == list(train.names)
    assert len(held) == 103
    assert held.names[:2] == ("digits/0037", "digits/0044")


@pytest.mark.parametrize(("text", "value"), [("2%", 0.02), ("0.5", 0.5), (0.25, 0.25), (" 12.5% ", 0.125)])
def test_fractions(text: str | float, value: float) -> None:
    assert fraction_of(text) == value


@pytest.mark.parametrize("text", ["0", "100%", "x", "-3%", "nan"])
def test_what_is_not_a_fraction(text: str) -> None:
    with pytest.raises(DataError) as caught:
        fraction_of(text)
    assert caught.value.message == f"{text!r} is not a part to hold out"
    assert caught.value.hint == "write a percentage such as 2%, or 0.02"


def test_a_limit_is_spread_over_classes(folder: MakeFolder) -> None:
    root = folder(cat=8, dog=2, emu=5)
    split = open_split(root, limit=9)
    assert np.bincount(split.labels).tolist() == [4, 2, 3] or np.bincount(split.labels).tolist() == [3, 2, 4]
    assert list(split.names) == sorted(split.names), "in their own order"
    assert set(open_split(root, limit=5).names) <= set(split.names)
    assert len(open_split(root, limit=100)) == 15


def test_a_limit_looks_at_no_other_image(folder: MakeFolder) -> None:
    root = folder(cat=4, dog=4)
    chosen = open_split(root, limit=4).names
    for path in root.rglob("*.jpg"):
        if path.relative_to(root).as_posix() not in chosen:
            path.write_bytes(b"broken")
    assert open_split(root, limit=4).names == chosen


def test_a_limit_of_nothing() -> None:
    with pytest.raises(DataError, match="a limit of 0 leaves no image"):
        open_split("digits", limit=0)


def test_few_shot_draws_k_of_each_class() -> None:
    train = open_split("digits#train")
    shots = few_shot(train, 4, seed=1)
    assert np.bincount(shots.labels).tolist() == [4] * 10
    assert shots.names == few_shot(train, 4, seed=1).names
    assert shots.names != few_shot(train, 4, seed=2).names
    assert set(few_shot(train, 2, seed=1).names) < set(shots.names)


def test_too_many_shots_are_refused(folder: MakeFolder) -> None:
    with pytest.raises(DataError) as caught:
        few_shot(open_split(folder(cat=3, dog=1)), 2)
    assert caught.value.message.endswith("2 images of each class are not there: dog (1)")
