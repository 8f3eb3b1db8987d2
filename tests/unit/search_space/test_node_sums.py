"""The sums of a cell's nodes, source by source."""

from __future__ import annotations

import pytest
import torch

from lfmcw_app.search_space.layers import OperationStyle
from lfmcw_app.search_space.node_sums import CellWeights, add_dropped, add_source, take_node
from lfmcw_app.search_space.outgoing_edges import OutgoingEdges


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_each_source_gets_its_weights_in_its_order():
    """A shared operation that is no candidate of an edge weighs zero there."""
    names = [
        [("skip_connect", "dil_conv_3x3"), ("max_pool_3x3", "dil_conv_3x3")],
        [("none", "skip_connect")],
    ]
    sources = [OutgoingEdges(2, 1, edges, OperationStyle()) for edges in names]

    def place(source, edge, name):
        row = source * 2 + edge
        return row * 2 + names[source][edge].index(name)

    weights = torch.arange(6.0).view(3, 2) + 1.0
    (gain, shared), (no_gain, last) = CellWeights(sources, place, 6)(weights)
    assert gain.tolist() == [2.0, 2.0, 4.0, 4.0]  # once per channel
    assert shared.tolist() == [[0.0, 1.0], [3.0, 0.0]]  # max_pool_3x3, skip_connect
    assert no_gain.tolist() == [] and last.tolist() == [[6.0]]


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("begun", [False, True])
@pytest.mark.parametrize("edges", [(0, 1, 2), (0, 2)])
def test_sums_are_those_that_are_written(edges, begun, shared):
    sums = normal(3, 2, 4, 5, 6) if begun else None
    maps = [normal(2, 6, 4, 5) + k for k in range(shared)]
    weights = normal(3, shared)
    banks = normal(2, 2 * len(edges) * 6, 4, 5)
    rows = {} if len(edges) == 3 else {edges: torch.tensor(edges)}
    found = add_source(sums, [(edges, banks)], maps, weights, rows, 6)
    for edge in range(3):
        expected = torch.zeros(2, 6, 4, 5, dtype=torch.float64)
        if begun:
            expected = expected + sums[edge].permute(0, 3, 1, 2)
        for weight, map_ in zip(weights[edge], maps, strict=True):
            expected = expected + weight * map_
        if edge in edges:
            at = edges.index(edge)
            for bank in banks.chunk(2, dim=1):
                expected = expected + bank[:, at * 6 : at * 6 + 6]
        node, found = take_node(found)
        torch.testing.assert_close(node, expected)
        assert node.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("begun", [False, True])
def test_every_edge_drops_by_itself(begun):
    torch.manual_seed(0)
    sums = normal(2, 1, 8, 8, 3) if begun else None
    maps, weights = 1.0 + normal(1, 3, 8, 8).abs(), torch.tensor([[2.0], [3.0]]).double()
    found = add_dropped(sums, maps, weights, 0.5)
    added = found - sums if begun else found
    for edge, weight in enumerate((2.0, 3.0)):
        sent = 2.0 * weight * maps.permute(0, 2, 3, 1)
        dropped = added[edge].abs() < 1e-12
        assert 0.3 < float(dropped.double().mean()) < 0.7
        torch.testing.assert_close(added[edge][~dropped], sent[~dropped])
    assert not torch.equal(added[0] == 0, added[1] == 0)
