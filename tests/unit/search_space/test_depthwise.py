"""Depthwise convolutions."""

from __future__ import annotations

import pytest
import torch
from nested_gradients import nested
from torch.nn import functional as F

from lfmcw_app.search_space import depthwise as depthwise_module
from lfmcw_app.search_space.depthwise import depthwise
from mlo.testing import relative_error


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("size", [6, 7])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
def test_a_depthwise_convolution_has_pytorchs_derivatives(
    kernel, stride, dilation, size, large, monkeypatch
):
    """A depthwise convolution has PyTorch's derivatives of every order."""
    if large:  # which takes other ways
        monkeypatch.setattr(depthwise_module, "LARGE", 0)
    torch.manual_seed(0)
    x = torch.randn(2, 3, size, size, dtype=torch.float64).contiguous(
        memory_format=torch.channels_last
    )
    inputs = (
        x.requires_grad_(),
        torch.randn(3, 1, kernel, kernel, dtype=torch.float64, requires_grad=True),
    )
    padding = dilation * (kernel // 2)
    expected = nested(lambda x, w: F.conv2d(x, w, None, stride, padding, dilation, 3), inputs)

    def ours(x, w):
        return depthwise(x, w, stride=stride, dilation=dilation)

    assert relative_error(nested(ours, inputs), expected) < 1e-12
    for wanted in (inputs, inputs[:1], inputs[1:]):  # where no graph of the gradient is wanted
        found = torch.autograd.grad(ours(*inputs).sin().sum(), wanted)
        exact = torch.autograd.grad(
            F.conv2d(*inputs, None, stride, padding, dilation, 3).sin().sum(), wanted
        )
        assert relative_error(dict(enumerate(found)), dict(enumerate(exact))) < 1e-12
