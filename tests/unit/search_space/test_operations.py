"""The candidate operations."""

from __future__ import annotations

import pytest
import torch

from lfmcw_app.search_space.layers import OperationStyle
from lfmcw_app.search_space.operations import DARTS_PRIMITIVES, make_operation
from lfmcw_app.search_space.supernet import Supernet


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("primitive", DARTS_PRIMITIVES[1:])
def test_every_primitive_keeps_or_halves_the_resolution(primitive, stride, norm):
    operation = make_operation(primitive, 6, stride, OperationStyle(norm=norm))
    assert operation(torch.randn(2, 6, 8, 8)).shape == (2, 6, 8 // stride, 8 // stride)


def test_pools_are_normalised_in_the_supernet_only():
    supernet = Supernet(in_channels=1, num_classes=2, channels=4, layers=3, nodes=1)
    in_supernet = supernet.cells[0].fans[0].pools["max_pool_3x3"]
    assert [isinstance(layer, torch.nn.BatchNorm2d) for layer in in_supernet] == [False, True]
    assert isinstance(
        make_operation("max_pool_3x3", 4, 1, OperationStyle(affine=True)), torch.nn.MaxPool2d
    )
