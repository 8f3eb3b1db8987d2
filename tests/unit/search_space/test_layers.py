"""The layers that operations are made of."""

from __future__ import annotations

import torch

from lfmcw_app.search_space.layers import FactorizedReduce, GaussianNoise, OperationStyle


def test_a_reduction_takes_any_number_of_channels():
    for channels in (2, 5):
        reduce = FactorizedReduce(3, channels, OperationStyle())
        assert reduce(torch.randn(2, 3, 8, 6)).shape == (2, channels, 4, 3)


def test_noise_does_not_depend_on_its_input():
    layer, x = GaussianNoise(2), torch.randn(2, 3, 8, 8, requires_grad=True)
    torch.manual_seed(0)
    first = layer(x)
    torch.manual_seed(0)
    assert torch.equal(layer(x + 5.0), first)
    assert first.shape == (2, 3, 4, 4)
    assert not first.requires_grad
