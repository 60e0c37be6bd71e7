"""Shape annotations are checked in these tests: a wrong shape is an error where it enters."""

import importlib
import pkgutil

import pytest
import torch
from jaxtyping import TypeCheckError

from . import shape_checks


def test_a_wrong_shape_is_caught() -> None:
    from clipmerge.data.pixels import normalise

    images, mean = torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3, 1, 1)
    assert normalise(images, mean, mean + 1).shape == images.shape
    with pytest.raises(TypeCheckError, match="mean"):
        normalise(images, mean.flatten(), mean + 1)
    with pytest.raises(TypeCheckError, match="images"):
        normalise(images[:, :2], mean, mean + 1)


def test_every_shape_that_the_library_states_is_checked() -> None:
    import clipmerge

    for module in pkgutil.walk_packages(clipmerge.__path__, "clipmerge."):
        importlib.import_module(module.name)
    assert shape_checks.unresolved == []
    assert {"clipmerge.data.pixels.normalise", "clipmerge.evaluate.heads.encode_text"} <= shape_checks.checked
