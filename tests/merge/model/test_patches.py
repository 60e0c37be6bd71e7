"""A patch embedding by matrix product is the convolution, in values, gradients and names."""

import pytest
import torch
from torch import nn

from clipmerge.model.patches import embed_patches_by_matmul


@pytest.mark.parametrize(("side", "patch"), [(32, 8), (34, 8), (16, 16)])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_the_convolutions(side: int, patch: int, bias: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 5, patch, patch, bias=bias)).double()
    pixels = torch.rand(2, 3, side, side, dtype=torch.float64, requires_grad=True)
    expected = model(pixels)
    wanted = torch.autograd.grad(expected.square().sum(), [pixels, *model.parameters()])
    names = list(model.state_dict())
    embed_patches_by_matmul(model)
    embedded = model(pixels)
    torch.testing.assert_close(embedded, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(embedded.square().sum(), [pixels, *model.parameters()])
    torch.testing.assert_close(gradients, wanted, rtol=1e-12, atol=1e-12)
    assert list(model.state_dict()) == names


def test_other_convolutions_stay_as_they_are() -> None:
    kept = [
        nn.Conv2d(3, 4, 3, 2),
        nn.Conv2d(3, 4, 3, 3, padding=1),
        nn.Conv2d(4, 4, 2, 2),
        nn.Conv2d(3, 6, 2, 2, groups=3),
    ]
    embed_patches_by_matmul(nn.ModuleList(kept))
    assert [type(module) for module in kept] == [nn.Conv2d] * 4


def test_autocast_computes_in_its_dtype() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 4, 4))
    embed_patches_by_matmul(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(torch.rand(1, 3, 8, 8)).dtype is torch.bfloat16
