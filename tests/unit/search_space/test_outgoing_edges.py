"""All edges that leave a state: each operation is evaluated where it is a candidate."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lfmcw_app.search_space.layers import OperationStyle
from lfmcw_app.search_space.outgoing_edges import OutgoingEdges, blocks_of_convolutions

STYLES = {norm: OperationStyle(norm=norm) for norm in ("batch", "group", "instance", "none")}


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_an_operation_is_evaluated_where_it_is_a_candidate():
    candidates = [("none", "sep_conv_3x3"), ("sep_conv_3x3", "skip_connect"), ("max_pool_3x3",)]
    edges = OutgoingEdges(2, 1, candidates, STYLES["none"]).double()
    assert edges.edges == {"max_pool_3x3": (2,), "sep_conv_3x3": (0, 1), "skip_connect": (1,)}
    assert edges.shared == ("max_pool_3x3", "skip_connect")
    state = normal(1, 2, 4, 4)
    assert edges.order == (("sep_conv_3x3", 0), ("sep_conv_3x3", 1))
    assert {key: rows.tolist() for key, rows in edges.rows.items()} == {
        (0, 1): [0, 1], (1,): [1], (2,): [2],
    }  # fmt: skip
    weighted, shared = edges(state, normal(4))
    assert [names for names, _ in weighted] == [(0, 1)]
    assert weighted[0][1].shape == (1, 4, 4, 4)
    assert shared["skip_connect"] is state
    expected = nn.functional.max_pool2d(state, 3, stride=1, padding=1)
    torch.testing.assert_close(shared["max_pool_3x3"], expected)


def test_the_mixing_weights_of_a_bank_are_those_of_its_edges():
    """Half the weight of an edge halves its maps, and leaves those of the others."""
    edges = OutgoingEdges(2, 1, [("sep_conv_3x3",)] * 2, STYLES["none"]).double()
    state = normal(1, 2, 4, 4)
    weights = torch.tensor([1.0, 1.0, 1.0, 1.0], dtype=torch.float64)  # one per channel
    whole = copy.deepcopy(edges)(state, weights)[0][0][1]
    half = edges(state, weights * torch.tensor([0.5, 0.5, 1.0, 1.0]))[0][0][1]
    torch.testing.assert_close(half[:, :2], 0.5 * whole[:, :2])
    torch.testing.assert_close(half[:, 2:], whole[:, 2:])


def test_convolutions_on_the_same_edges_are_evaluated_together():
    """With other edges, or another kind of bank, each is by itself."""
    candidates = [
        ("sep_conv_3x3", "dil_conv_5x5", "nor_conv_3x3", "dil_conv_3x3"),
        ("sep_conv_3x3", "dil_conv_5x5", "nor_conv_3x3"),
    ]
    edges = OutgoingEdges(2, 1, candidates, STYLES["batch"]).double()
    together, alone, kind = ("dil_conv_5x5", "sep_conv_3x3"), ("dil_conv_3x3",), ("nor_conv_3x3",)
    assert set(edges.groups) == {together, alone, kind}
    gain = normal(len(edges.order) * 2)
    found = {maps.shape[1]: maps for at, maps in edges(normal(2, 2, 4, 4), gain)[0] if len(at) == 2}
    assert set(found) == {8, 4}  # two banks on two edges side by side; one


def test_the_weights_of_edges_stand_below_one_another():
    edges = OutgoingEdges(2, 2, [("sep_conv_3x3", "skip_connect")] * 3, STYLES["none"])
    blocks = blocks_of_convolutions(nn.ModuleList([edges, nn.Conv2d(1, 1, 1)]))
    assert set(blocks.values()) == {3}
    for layer, count in blocks.items():
        assert layer.weight.shape[0] % count == 0


def test_an_unknown_primitive_is_refused():
    with pytest.raises(ValueError, match="Did you mean 'sep_conv_3x3'"):
        OutgoingEdges(2, 1, [("sep_conv_3x4",)], STYLES["none"])
