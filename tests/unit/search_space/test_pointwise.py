"""Pointwise convolutions in groups."""

from __future__ import annotations

import pytest
import torch
from nested_gradients import nested
from torch.nn import functional as F

from lfmcw_app.search_space.pointwise import (
    DENSE_CHANNELS,
    PointwiseConv,
    grouped_linear,
    side_by_side,
)
from mlo.testing import relative_error


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [3, 20])
@pytest.mark.parametrize("groups", [1, 4])
def test_a_grouped_pointwise_convolution_is_pytorchs(groups, channels, stride):
    """A pointwise convolution in groups has PyTorch's derivatives."""
    assert 4 * 3 <= DENSE_CHANNELS < 4 * 20  # both ways are taken
    torch.manual_seed(0)
    layer = PointwiseConv(channels, 6, groups=groups, stride=stride).double()
    x = torch.randn(2, groups * channels, 3, 3, dtype=torch.float64, requires_grad=True)
    expected = nested(lambda x, w: F.conv2d(x, w, None, stride, groups=groups), (x, layer.weight))
    assert relative_error(nested(lambda x, w: layer(x), (x, layer.weight)), expected) < 1e-12


def test_a_product_in_groups_may_change_the_width():
    x = torch.randn(5, 2, 30, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, 30, dtype=torch.float64, requires_grad=True)
    expected = nested(lambda x, w: torch.einsum("pgi,goi->pgo", x, w), (x, weight))
    found = nested(lambda x, w: grouped_linear([x], [w]), (x, weight))
    assert relative_error(found, expected) < 1e-12


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [2, 20])
def test_convolutions_side_by_side_are_each_their_own(channels, stride):
    assert 3 * 2 <= DENSE_CHANNELS < 3 * 20  # both ways are taken
    torch.manual_seed(0)
    layers = [PointwiseConv(channels, 6, groups=groups, stride=stride) for groups in (1, 2)]
    weights = tuple(layer.double().weight for layer in layers)
    maps = tuple(
        torch.randn(2, groups * channels, 3, 3, dtype=torch.float64, requires_grad=True)
        for groups in (1, 2)
    )

    def apart(*_):
        return torch.cat([layer(x) for layer, x in zip(layers, maps, strict=True)], dim=1)

    inputs = (*maps, *weights)
    found = nested(lambda *_: side_by_side(maps, layers), inputs)
    assert relative_error(found, nested(apart, inputs)) < 1e-12


def test_products_in_groups_serve_under_autocast():
    torch.manual_seed(0)
    layer, x = PointwiseConv(20, 6, groups=4), torch.randn(2, 80, 3, 3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    found = torch.autograd.grad(out.float().square().sum(), (x, layer.weight))
    exact = torch.autograd.grad(layer(x).square().sum(), (x, layer.weight))
    assert [g.dtype for g in found] == [torch.float32] * 2
    assert relative_error(dict(enumerate(found)), dict(enumerate(exact))) < 0.02
