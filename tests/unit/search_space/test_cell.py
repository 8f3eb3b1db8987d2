"""A cell of the supernet: edges, dropout on identities, partial channels."""

from __future__ import annotations

import pytest
import torch

from lfmcw_app.search_space.cell import Cell, edge_count, edge_index
from lfmcw_app.search_space.layers import OperationStyle
from lfmcw_app.search_space.operations import DARTS_PRIMITIVES
from lfmcw_app.search_space.supernet import Supernet


def test_edges_are_numbered_node_by_node():
    assert edge_count(4) == 14
    rows = [edge_index(node, source) for node in range(4) for source in range(2 + node)]
    assert rows == list(range(14))


def bare_cell(primitives, *, reduces=False, part=1):
    """A cell with one node of four channels, whose inputs are passed on as they are."""
    cell = Cell(
        (4, 4),
        4,
        nodes=1,
        reduces=reduces,
        reduced_before=False,
        primitives=[primitives] * 2,
        style=OperationStyle(),
        partial_channels=part,
    )
    cell.preprocess0 = cell.preprocess1 = torch.nn.Identity()
    return cell


def test_skip_dropout_zeroes_entries_of_an_identity():
    """Skip dropout zeroes entries of an identity, and scales the others."""
    torch.manual_seed(0)
    cell = bare_cell(("none", "skip_connect"))
    x, y = 1.0 + torch.rand(2, 8, 4, 16, 16)
    weights = torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    out = cell(x, y, weights, 0.3) / 0.5
    dropped = out == 0
    assert float(dropped.float().mean()) == pytest.approx(0.3, abs=0.02)
    assert torch.allclose(out[~dropped], (x / 0.7)[~dropped])
    assert torch.equal(cell.eval()(x, y, weights, 0.3), 0.5 * x)


def test_skip_dropout_is_drawn_for_each_edge():
    cell = bare_cell(("none", "skip_connect"))
    x = torch.ones(8, 4, 16, 16)
    out = cell(x, x, torch.tensor([[0.5, 0.5], [0.5, 0.5]]), 0.5)
    assert out.unique().tolist() == [0.0, 1.0, 2.0]  # one of the two, or both


@pytest.mark.parametrize("part", [1, 2])
@pytest.mark.parametrize(
    ("primitives", "reduces"),
    [(tuple(p for p in DARTS_PRIMITIVES if p != "skip_connect"), False), (DARTS_PRIMITIVES, True)],
)
def test_skip_dropout_leaves_everything_but_identities_alone(primitives, reduces, part):
    cell = bare_cell(primitives, reduces=reduces, part=part)
    x, y = torch.randn(2, 2, 4, 6, 6)
    weights = torch.rand(2, len(primitives))
    state = torch.get_rng_state()
    assert torch.equal(cell(x, y, weights, 0.9), cell(x, y, weights))
    assert torch.equal(torch.get_rng_state(), state)


def test_channels_that_cannot_be_split_are_refused():
    with pytest.raises(ValueError, match="6 channels cannot be split into 4"):
        Supernet(in_channels=1, num_classes=2, channels=6, layers=3, nodes=1, partial_channels=4)
