"""Operations of the same kind on several edges: the same as one after the other."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lfmcw_app.search_space.batched_operations import (
    CONVOLUTIONS,
    ConvolutionBank,
    OutgoingEdges,
    ReduceBank,
    blocks_of_convolutions,
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
@pytest.mark.parametrize("primitive", CONVOLUTIONS)
def test_a_bank_is_its_edges_side_by_side(primitive, stride, norm):
    """Edge e has the channels from e · C on, of the weights and of the maps."""
    bank = ConvolutionBank(primitive, 2, 3, stride, STYLES[norm]).double()
    state, gain = normal(2, 2, 6, 6), torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    found = bank(state.repeat(1, 3, 1, 1), gain.repeat_interleave(2))
    for edge in range(3):
        single = ConvolutionBank(primitive, 2, 1, stride, STYLES[norm]).double()
        single = edge_of(bank, edge, single)
        expected = single(state, gain[edge].expand(2))
        torch.testing.assert_close(found[:, 2 * edge : 2 * edge + 2], expected)


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


def test_an_operation_is_evaluated_where_it_is_a_candidate():
    candidates = [("none", "sep_conv_3x3"), ("sep_conv_3x3", "skip_connect"), ("max_pool_3x3",)]
    edges = OutgoingEdges(2, 1, candidates, STYLES["none"]).double()
    assert edges.edges == {"max_pool_3x3": (2,), "sep_conv_3x3": (0, 1), "skip_connect": (1,)}
    assert edges.shared == ("max_pool_3x3", "skip_connect")
    state = normal(1, 2, 4, 4)
    sums, shared = edges(state, [torch.tensor([0.5, 2.0], dtype=torch.float64)])
    assert set(sums) == {(0, 1)}
    assert sums[0, 1].shape == (1, 4, 4, 4)
    assert shared["skip_connect"] is state
    expected = nn.functional.max_pool2d(state, 3, stride=1, padding=1)
    torch.testing.assert_close(shared["max_pool_3x3"], expected)


def test_the_mixing_weights_of_a_bank_are_those_of_its_edges():
    """Half the weight of an edge halves its maps, and leaves those of the others."""
    edges = OutgoingEdges(2, 1, [("sep_conv_3x3",)] * 2, STYLES["none"]).double()
    state = normal(1, 2, 4, 4)
    weights = torch.tensor([1.0, 1.0], dtype=torch.float64)
    whole = copy.deepcopy(edges)(state, [weights])[0][0, 1]
    half = edges(state, [weights * torch.tensor([0.5, 1.0])])[0][0, 1]
    torch.testing.assert_close(half[:, :2], 0.5 * whole[:, :2])
    torch.testing.assert_close(half[:, 2:], whole[:, 2:])


def test_the_weights_of_edges_stand_below_one_another():
    edges = OutgoingEdges(2, 2, [("sep_conv_3x3", "skip_connect")] * 3, STYLES["none"])
    blocks = blocks_of_convolutions(nn.ModuleList([edges, nn.Conv2d(1, 1, 1)]))
    assert set(blocks.values()) == {3}
    for layer, count in blocks.items():
        assert layer.weight.shape[0] % count == 0


def test_an_unknown_primitive_is_refused():
    with pytest.raises(ValueError, match="Did you mean 'sep_conv_3x3'"):
        OutgoingEdges(2, 1, [("sep_conv_3x4",)], STYLES["none"])
