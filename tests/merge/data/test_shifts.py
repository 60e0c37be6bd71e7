"""Shifts change images in a known way, the same one for the same name."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageFilter

from clipmerge.data.open import open_split
from clipmerge.data.shifts import SHIFTS, parse_shift
from clipmerge.data.split import Split
from clipmerge.errors import DataError

from .conftest import MakeFolder


def shifted(split: Split, text: str) -> Split:
    return replace(split, shifts=(*split.shifts, parse_shift(text)))


def array(split: Split, i: int = 0) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    return np.asarray(split.image(i), np.int64)


def test_a_shift_in_the_text_of_data(folder: MakeFolder) -> None:
    root = folder(cat=2, dog=2)
    plain, inverted = open_split(root), open_split(f"{root}@invert")
    assert np.array_equal(array(inverted, 1), 255 - array(plain, 1))
    assert (inverted.names, inverted.labels.tolist()) == (plain.names, plain.labels.tolist())
    assert inverted.source == f"{root}@invert"
    assert inverted.digest != plain.digest
    assert inverted.read_bytes(0) is None


def test_shifts_come_one_after_the_other() -> None:
    both = open_split("digits#test@rotate:20@invert")
    expected = open_split("digits#test").image(3).rotate(20, Image.Resampling.BICUBIC)
    assert np.array_equal(array(both, 3), 255 - np.asarray(expected, np.int64))
    assert both.digest != open_split("digits#test@invert@rotate:20").digest


@pytest.mark.parametrize("name", sorted(SHIFTS))
def test_every_shift_changes_pixels_and_keeps_size_and_mode(folder: MakeFolder, name: str) -> None:
    split = open_split(folder(cat=1, dog=1))
    changed = shifted(split, name)
    assert (changed.image(1).size, changed.image(1).mode) == (split.image(1).size, "RGB")
    assert np.abs(array(changed, 1) - array(split, 1)).mean() > 1
    assert np.array_equal(array(shifted(split, name), 1), array(changed, 1))


def test_shifts_are_what_they_are_called(folder: MakeFolder) -> None:
    split = open_split(folder(cat=1, dog=1))
    plain = array(split)
    assert np.array_equal(
        array(shifted(split, "blur:2")), np.asarray(split.image(0).filter(ImageFilter.GaussianBlur(2)))
    )
    assert np.array_equal(array(shifted(split, "brightness:0.5")), plain // 2)
    gray = array(shifted(split, "gray"))
    assert (gray[..., 0] == gray[..., 2]).all()
    assert np.abs(gray[..., 1] - plain @ [0.299, 0.587, 0.114]).max() <= 1
    blocks = array(shifted(split, "pixelate:10"))
    assert (blocks[:10, :10] == blocks[0, 0]).all()
    assert np.abs(blocks[0, 0] - plain[:10, :10].mean((0, 1))).max() <= 1


def test_noise_has_the_deviation_asked_for_and_follows_the_name(folder: MakeFolder) -> None:
    split = open_split(folder(cat=3, dog=1))
    noisy = shifted(split, "noise:0.02")
    middle = (array(split) > 30) & (array(split) < 225)
    assert np.std((array(noisy) - array(split))[middle]) == pytest.approx(5.1, rel=0.1)
    assert np.array_equal(array(noisy.subset([2]), 0), array(noisy, 2))
    assert np.array_equal(array(shifted(split.subset([2]), "noise:0.02")), array(noisy, 2))
    same = np.zeros((2, 8, 8), np.uint8) + 128
    assert not np.array_equal(same[0] + array(noisy, 0)[:8, :8, 0], same[1] + array(noisy, 1)[:8, :8, 0])


@pytest.mark.parametrize("text", ["rotate:90", "rotate:x", "noise:-1", "invert:2", "rotate:nan"])
def test_values_that_would_change_the_label(text: str) -> None:
    name, value = text.split(":")
    with pytest.raises(DataError) as caught:
        open_split(f"digits@{text}")
    assert caught.value.message == f"{value!r} is not a value for the shift {name!r}"
    assert str(caught.value.hint).startswith(f"{name} takes ")


def test_an_unknown_shift() -> None:
    with pytest.raises(DataError) as caught:
        open_split("digits#test@rotat:20")
    assert caught.value.message == "there is no shift 'rotat'"
    assert str(caught.value.hint).endswith("did you mean rotate?")
