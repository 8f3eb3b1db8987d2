"""Operations of the same kind on several edges: the same as one after the other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lfmcw_app.search_space.batched_operations import (
    ConvolutionBank,
    JointConvolutions,
    LayerBank,
    ReduceBank,
)
from lfmcw_app.search_space.layers import OperationStyle

STYLES = {norm: OperationStyle(norm=norm) for norm in ("batch", "group", "instance", "none")}


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def edge_of(bank, edge, single):
    """A bank of one edge with the weights of one of several."""
    ours, theirs = bank.state_dict(), single.state_dict()
    for name, value in theirs.items():
        if value.dim():
            size = len(value)
            theirs[name] = ours[name][edge * size : (edge + 1) * size]
    single.load_state_dict(theirs)
    return single


@pytest.mark.parametrize("norm", STYLES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (5, 1), (3, 2), (5, 2)])
def test_a_bank_is_its_edges_side_by_side(kernel, dilation, stride, norm):
    """Edge e has the channels from e · C on, of the weights and of the maps."""
    bank = ConvolutionBank(kernel, dilation, 2, 3, stride, STYLES[norm]).double()
    state, gain = normal(2, 2, 6, 6), torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    found = bank(state.repeat(1, 3, 1, 1), gain.repeat_interleave(2))
    for edge in range(3):
        single = ConvolutionBank(kernel, dilation, 2, 1, stride, STYLES[norm]).double()
        single = edge_of(bank, edge, single)
        expected = single(state, gain[edge].expand(2))
        torch.testing.assert_close(found[:, 2 * edge : 2 * edge + 2], expected)


@pytest.mark.parametrize("norm", STYLES)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kinds", [((3, 1), (5, 1), (3, 2), (5, 2)), ((3, 2), (5, 2)), ((3, 1),)])
def test_joint_convolutions_are_their_banks_side_by_side(kinds, stride, norm):
    banks = [ConvolutionBank(*kind, 2, 3, stride, STYLES[norm]).double() for kind in kinds]
    joint = JointConvolutions(banks, 2, STYLES[norm]).double()
    assert not list(joint.parameters())
    state, gain = normal(2, 6, 6, 6), normal(len(banks) * 6)
    expected = [bank(state, own) for bank, own in zip(banks, gain.split(6), strict=True)]
    torch.testing.assert_close(joint(banks, state, gain), torch.cat(expected, dim=1))


@pytest.mark.parametrize("channels", [2, 5])
def test_a_bank_of_reductions_is_its_edges_side_by_side(channels):
    bank = ReduceBank(channels, 2, STYLES["none"]).double()
    state = normal(2, channels, 6, 6)
    found = bank(state, torch.ones(2 * channels, dtype=torch.float64))
    assert found.shape == (2, 2 * channels, 3, 3)
    for edge in range(2):
        single = edge_of(bank, edge, ReduceBank(channels, 1, STYLES["none"]).double())
        expected = single(state, torch.ones(channels, dtype=torch.float64))
        place = slice(edge * channels, (edge + 1) * channels)
        torch.testing.assert_close(found[:, place], expected)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_bank_of_any_layer_is_its_layers_side_by_side(stride):
    def layer(channels, stride, style):
        return nn.Conv2d(channels, channels, 3, stride, padding=1)

    bank = LayerBank(layer, 2, 3, stride, STYLES["none"]).double()
    state, gain = normal(2, 2, 6, 6), torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    found = bank(state, gain.repeat_interleave(2))
    for edge in range(3):
        expected = gain[edge] * bank.layers[edge](state)
        torch.testing.assert_close(found[:, 2 * edge : 2 * edge + 2], expected)
