"""Several sets of images as one: classes, prompts, images, and shares of an image set."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from clipmerge.data.join import join
from clipmerge.data.open import open_split
from clipmerge.data.pixels import pixels
from clipmerge.data.prompts import class_prompts, recorded_prompts
from clipmerge.errors import DataError


@pytest.fixture(scope="module")
def sets() -> dict[str, Any]:
    """Ten digits, the same digits turned under three templates, and two of the digits under the first's template."""
    plain = replace(open_split("digits#val", limit=20), templates=("the digit {}.", "a {}"))
    turned = replace(
        open_split("digits#val@rotate:20", limit=10), templates=("turned {}", "the {}, turned", "{} turned")
    )
    two = replace(plain.subset([0, 5]), source="two")
    return {"plain": plain, "turned": turned, "two": two}


def test_each_class_keeps_the_prompts_of_its_set(sets: dict[str, Any]) -> None:
    joined = join(sets)
    assert len(joined) == 32
    assert len(joined.classes) == 20  # the third set's classes have the first's prompts
    np.testing.assert_array_equal(joined.labels[:20], sets["plain"].labels)
    np.testing.assert_array_equal(joined.labels[20:30], sets["turned"].labels + 10)
    np.testing.assert_array_equal(joined.labels[30:], sets["two"].labels)
    rows = class_prompts(joined)
    zero = sets["plain"].classes[0]
    assert rows[0] == [f"the digit {zero}.", f"a {zero}"] * 3
    assert rows[10] == [f"turned {zero}", f"the {zero}, turned", f"{zero} turned"] * 2
    assert class_prompts(joined, ["a photo of {}"])[10] == [f"a photo of {zero}"]
    entries = recorded_prompts(joined)
    assert [entry["templates"][0] for entry in entries] == ["the digit {}.", "turned {}", "the digit {}."]
    assert joined.names[20].startswith("turned/")


def test_images_are_those_of_the_sets_shifted_as_there(sets: dict[str, Any]) -> None:
    joined, preprocess = join(sets), {"size": 8, "resize_mode": "shortest", "interpolation": "bicubic"}
    together = pixels(joined, preprocess)
    np.testing.assert_array_equal(together, np.concatenate([pixels(s, preprocess) for s in sets.values()]))
    assert joined.digest == join(sets).digest
    assert joined.digest != join({"plain": sets["plain"], "turned": sets["plain"]}).digest


def test_captions_join_captions_only(sets: dict[str, Any]) -> None:
    plain = sets["plain"]
    bare = replace(plain, classes=(), labels=np.full(len(plain), -1), captions=("x",) * len(plain))
    assert join({"a": bare, "b": bare}).captions == ("x",) * 40
    with pytest.raises(DataError, match="captions and images with classes"):
        join({"a": bare, "b": plain})


def test_a_part_of_a_set_is_named_where_the_set_is() -> None:
    whole = open_split("digits#train")
    third = open_split("digits#train[:30%]")
    assert len(third) == round(0.3 * len(whole))
    assert set(np.bincount(third.labels)) <= {len(third) // 10, len(third) // 10 + 1}
    assert len(open_split("digits#train[:50]@blur:1")) == 50
    assert len(open_split("digits#train[:50]", limit=20)) == 20
    assert len(open_split("digits#train[:100%]")) == len(open_split("digits#train"))
    for wrong in ("digits#train[:0]", "digits#train[:0%]", "digits#train[30%]", "digits#train[:x]"):
        with pytest.raises(DataError, match="no share of the images"):
            open_split(wrong)
