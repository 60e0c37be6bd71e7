"""A hint where nobody names the model: which of open_clip's have these sizes."""

import pytest

from clipmerge.errors import ModelError
from clipmerge.model import build_model, resolve_model
from clipmerge.model.guess import guess_model
from clipmerge.weights.weights import from_state_dict, load


def shapes_of(weights):
    return {name: tensor.shape for name, tensor in weights.checkpoints[0].tensors.items()}


@pytest.mark.parametrize("name", ["ViT-B-32", "RN50", "coca_ViT-B-32"])
def test_a_models_own_sizes_lead_back_to_it(name):
    found = guess_model(shapes_of(from_state_dict(build_model(resolve_model(name)).state_dict())))
    assert name in found
    assert all(name in other or other in name for other in found)


def test_sizes_of_our_own_are_nobodys(tiny_checkpoints):
    assert guess_model(shapes_of(load(tiny_checkpoints["base"]))) == []
    assert guess_model({"weight": (2,)}) == []


def test_the_error_names_them():
    weights = from_state_dict(build_model(resolve_model("ViT-B-32")).state_dict())
    with pytest.raises(ModelError) as caught:
        resolve_model(None, weights)
    assert (
        caught.value.hint
        == "their sizes are those of ViT-B-32 or ViT-B-32-quickgelu: name the right one (--model)"
    )
