"""Pointwise convolutions in groups."""

from __future__ import annotations

import pytest
import torch
from nested_gradients import nested
from torch.nn import functional as F

from lfmcw_app.search_space.pointwise import DENSE_CHANNELS, PointwiseConv, grouped_linear
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
    assert relative_error(nested(grouped_linear, (x, weight)), expected) < 1e-12
