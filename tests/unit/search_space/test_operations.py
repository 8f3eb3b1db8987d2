"""The primitives: every one keeps the contract; a new one is one entry."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lfmcw_app.search_space.batched_operations import LayerBank
from lfmcw_app.search_space.cell import Cell
from lfmcw_app.search_space.layers import OperationStyle
from lfmcw_app.search_space.operations import (
    DARTS_PRIMITIVES,
    PRIMITIVES,
    Primitive,
    make_operation,
)
from lfmcw_app.search_space.supernet import Supernet
from lfmcw_app.testing import PrimitiveContract


@pytest.mark.parametrize("primitive", [name for name in PRIMITIVES if name != "none"])
class TestPrimitives(PrimitiveContract):
    """All of them."""


def test_the_candidates_of_darts_are_its_eight():
    assert DARTS_PRIMITIVES == (
        "none", "max_pool_3x3", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "sep_conv_5x5",
        "dil_conv_3x3", "dil_conv_5x5",
    )  # fmt: skip


def test_pools_are_normalised_in_the_supernet_only():
    supernet = Supernet(in_channels=1, num_classes=2, channels=4, layers=3, nodes=1)
    in_supernet = supernet.cells[0].fans[0].pools["max_pool_3x3"]
    assert [isinstance(layer, torch.nn.BatchNorm2d) for layer in in_supernet] == [False, True]
    assert isinstance(
        make_operation("max_pool_3x3", 4, 1, OperationStyle(affine=True)), torch.nn.MaxPool2d
    )


@pytest.fixture
def doubling(monkeypatch):
    """A primitive of one's own: twice the state."""

    class Twice(nn.Module):
        def __init__(self, stride):
            super().__init__()
            self.stride = stride

        def forward(self, x):
            return 2.0 * x[:, :, :: self.stride, :: self.stride]

    entry = Primitive(layer=lambda channels, stride, style: Twice(stride), colour="#000000")
    monkeypatch.setitem(PRIMITIVES._entries, "twice", entry)


def test_an_own_primitive_is_evaluated_in_cells_of_both_kinds(doubling):
    """A node that reads two states through it is twice their sum, not the identity."""
    for reduces in (False, True):
        cell = Cell(
            (4, 4), 4, nodes=2, reduces=reduces, reduced_before=False,
            primitives=[("twice",)] * 5, style=OperationStyle(),
        ).eval()  # fmt: skip
        assert isinstance(cell.fans[0].banks["twice"], LayerBank)
        x = torch.randn(2, 4, 8, 8)
        out = cell(x, x, torch.ones(5, 1))
        step = 2 if reduces else 1
        states = [cell.preprocess0(x), cell.preprocess1(x)]
        expected = 2.0 * (states[0] + states[1])[:, :, ::step, ::step]
        torch.testing.assert_close(out[:, :4], expected)


def test_an_unknown_primitive_is_refused_everywhere():
    for make in (
        lambda: make_operation("conv_9x9", 4, 1, OperationStyle()),
        lambda: Supernet(in_channels=1, num_classes=2, primitives=("none", "conv_9x9")),
        lambda: Cell(
            (4, 4), 4, nodes=1, reduces=False, reduced_before=False,
            primitives=[("conv_9x9",)] * 2, style=OperationStyle(),
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="Unknown primitive 'conv_9x9'"):
            make()


def test_none_is_no_operation_of_a_derived_network():
    with pytest.raises(ValueError, match="not an operation of a derived network"):
        make_operation("none", 4, 1, OperationStyle())
    with pytest.raises(ValueError, match="not an operation that can be evaluated"):
        PRIMITIVES["none"].in_supernet(4, 1, 1, OperationStyle())
