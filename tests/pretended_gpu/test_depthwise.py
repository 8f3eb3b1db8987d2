"""Depthwise convolutions on a GPU: no convolution per channel at any order."""

from __future__ import annotations

import pytest
import torch

from lfmcw_app.search_space.depthwise import depthwise


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_a_hessian_product_takes_no_convolution_per_channel(gpu, kernel, stride, dilation):
    x = torch.randn(2, 32, 8, 8, device="cuda").contiguous(memory_format=torch.channels_last)
    weight = torch.randn(32, 1, kernel, kernel, device="cuda", requires_grad=True)
    inputs = x.requires_grad_(), weight
    out = depthwise(*inputs, stride=stride, dilation=dilation)
    gradient = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
    with gpu.watched() as seen:
        torch.autograd.grad([g.sum() for g in gradient], inputs)
    count = sum(n for name, n in seen.launches.items() if "convolution" in name)
    assert 0 < count <= 8, seen.launches
