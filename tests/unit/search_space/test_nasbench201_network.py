"""Networks of NAS-Bench-201: sizes as published, supernets as the sums that they are written as."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lfmcw_app.errors import InputError
from lfmcw_app.search_space.cost import network_cost
from lfmcw_app.search_space.layers import OperationStyle
from lfmcw_app.search_space.nasbench201 import OPERATIONS, SumCandidates, SumCell, sum_edges
from lfmcw_app.search_space.nasbench201_network import (
    DerivedSumCell,
    MixedSumCell,
    SumArchitecture,
    SumNetwork,
    SumSupernet,
)
from lfmcw_app.search_space.operations import make_operation

STYLE = OperationStyle(activation="silu")


def candidates_of(nodes):
    return SumCandidates(cell=(OPERATIONS,) * len(sum_edges(nodes)))


@pytest.mark.parametrize(
    ("operation", "parameters", "multiply_adds"),
    [
        ("none", 73_306, 7.78305),
        ("skip_connect", 73_306, 7.78305),
        ("avg_pool_3x3", 73_306, 7.78305),
        ("nor_conv_3x3", 1_531_546, 220.11969),
    ],
)
def test_sizes_are_the_published_ones(operation, parameters, multiply_adds):
    # Dong and Yang (2020), the smallest and the largest architectures of their table.
    cell = SumCell((operation,) * 6)
    network = SumNetwork(cell, in_channels=3, num_classes=10, channels=16, layers=15)
    assert network.parameter_count() == parameters
    counted = network_cost(network, 32, 3).multiply_adds
    assert counted == pytest.approx(multiply_adds, abs=2e-5)


class EdgeByEdge(nn.Module):
    """Node t = Σ_s Σ_o weight[s→t, o] · o(state s), as written."""

    def __init__(self, channels, candidates):
        super().__init__()
        self.edges = sum_edges(candidates.nodes)
        self.nodes = candidates.nodes
        self.layers = nn.ModuleList(
            nn.ModuleDict({n: make_operation(n, channels, 1, STYLE) for n in names if n != "none"})
            for names in candidates.cell
        )

    def forward(self, x, weights):
        states = [x]
        for node in range(1, self.nodes):
            total = torch.zeros_like(x)
            for row, (end, source) in enumerate(self.edges):
                if end == node:
                    for name, layer in self.layers[row].items():
                        total = total + weights[row, OPERATIONS.index(name)] * layer(states[source])
            states.append(total)
        return states[-1]


def copy_weights(cell, plain, channels):
    """The banks' weights into the layers of their edges."""
    for source, outgoing in enumerate(cell.outgoing):
        rows = [row for row, (_, start) in enumerate(plain.edges) if start == source]
        for name, bank in outgoing.banks.items():
            parts = bank.layer.weight.split(channels)
            for edge, part in zip(outgoing.edges[name], parts, strict=True):
                plain.layers[rows[edge]][name][1].weight.data.copy_(part)


@pytest.mark.parametrize("nodes", [2, 3, 4])
def test_a_mixed_cell_is_the_sum_over_edges_as_written(nodes):
    torch.manual_seed(0)
    candidates, channels = candidates_of(nodes), 3
    cell = MixedSumCell(channels, candidates, STYLE).double()
    plain = EdgeByEdge(channels, candidates).double()
    copy_weights(cell, plain, channels)
    x = torch.randn(4, channels, 6, 6, dtype=torch.double, requires_grad=True)
    alpha = torch.randn(len(candidates.cell), 5, dtype=torch.double, requires_grad=True)
    made, wanted = cell(x, alpha.softmax(1)), plain(x, alpha.softmax(1))
    torch.testing.assert_close(made, wanted, rtol=1e-10, atol=1e-12)

    # First and second derivatives, which a hypergradient needs.
    for out in (made, wanted):
        slopes = torch.autograd.grad(out.square().sum(), (x, alpha), create_graph=True)
        second = torch.autograd.grad(slopes[1].square().sum(), (x, alpha))
        if out is made:
            kept = (*slopes, *second)
        else:
            for ours, theirs in zip(kept, (*slopes, *second), strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_a_cell_with_one_operation_per_edge_is_the_derived_one():
    torch.manual_seed(0)
    operations = ("nor_conv_3x3", "skip_connect", "nor_conv_1x1", "none", "avg_pool_3x3", "none")
    candidates = candidates_of(4)
    cell = MixedSumCell(2, candidates, OperationStyle())
    derived = DerivedSumCell(SumCell(operations), 2)
    plain = EdgeByEdge(2, candidates)
    copy_weights(cell, plain, 2)
    for (node, source, name), layer in zip(derived.kept, derived.operations, strict=True):
        if name.startswith("nor_conv"):
            row = plain.edges.index((node, source))
            layer[1].weight.data.copy_(plain.layers[row][name][1].weight)
    chosen = torch.tensor([OPERATIONS.index(name) for name in operations])
    mixing = nn.functional.one_hot(chosen, 5).float()
    x = torch.randn(4, 2, 8, 8)
    torch.testing.assert_close(cell(x, mixing), derived(x))


def test_a_cell_without_operations_gives_zeros():
    x = torch.randn(2, 3, 4, 4)
    assert torch.equal(DerivedSumCell(SumCell(("none",) * 6), 3)(x), torch.zeros_like(x))


@pytest.mark.parametrize("norm", ["batch", "group", "instance", "none"])
def test_the_supernet_has_the_skeleton_and_any_norm(norm):
    style = OperationStyle(norm=norm)
    supernet = SumSupernet(
        in_channels=3, num_classes=5, channels=4, layers=6, candidates=candidates_of(3), style=style
    )
    arch = SumArchitecture(candidates_of(3))
    images = torch.randn(2, 3, 8, 8)
    assert supernet.features(images, arch()).shape == (2, 16, 2, 2)
    assert supernet(images, arch()).shape == (2, 5)
    assert len(supernet.cells) == 6
    assert len(supernet.reductions) == 2
    # Only at the beginning of the second and the third stage the resolution is halved.
    sizes = [supernet.reduced_before(layer, torch.zeros(1, 4, 8, 8)).shape[-1] for layer in (0, 1)]
    assert sizes == [8, 8]
    assert supernet.reduced_before(2, torch.zeros(1, 4, 8, 8)).shape == (1, 8, 4, 4)


def test_activation_checkpointing_changes_no_number():
    made = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        supernet = SumSupernet(
            in_channels=1, num_classes=3, channels=4, layers=3, candidates=candidates_of(3),
            style=OperationStyle(), checkpointing=checkpointing,
        )  # fmt: skip
        arch = SumArchitecture(candidates_of(3))
        loss = supernet(torch.randn(4, 1, 8, 8), arch()).square().sum()
        made.append(torch.autograd.grad(loss, [*supernet.parameters(), *arch.parameters()]))
    assert all(map(torch.equal, *made))


def test_stages_need_equally_many_cells():
    with pytest.raises(InputError, match="multiple of 3, got 4"):
        SumNetwork(SumCell(("none",)), in_channels=3, num_classes=5, channels=4, layers=4)


def test_images_that_cannot_be_halved_twice_are_refused():
    network = SumNetwork(SumCell(("none",)), in_channels=3, num_classes=5, channels=4, layers=3)
    with pytest.raises(InputError, match="divisible by 4"):
        network(torch.zeros(1, 3, 10, 10))


def test_drop_path_drops_edges_that_are_not_identities():
    torch.manual_seed(0)
    x = torch.ones(64, 2, 4, 4)
    pooled = DerivedSumCell(SumCell(("avg_pool_3x3",)), 2)(x, 0.5)
    kept = pooled.flatten(1).amax(1)
    assert set(kept.tolist()) == {0.0, 2.0}
    assert torch.equal(DerivedSumCell(SumCell(("skip_connect",)), 2)(x, 0.5), x)


def test_a_supernet_keeps_no_running_statistics():
    """It normalises by the batch, in evaluation too. The derived network keeps them."""
    supernet = SumSupernet(
        in_channels=1, num_classes=3, channels=4, layers=3, candidates=candidates_of(3),
        style=OperationStyle(),
    )  # fmt: skip
    assert supernet.state_dict().keys() == dict(supernet.named_parameters()).keys()
    mixing, images = SumArchitecture(candidates_of(3))(), torch.randn(4, 1, 8, 8)
    trained = supernet(images, mixing)
    assert torch.equal(supernet.eval()(images, mixing), trained)
    cell = SumCell(("nor_conv_3x3",) * 3)
    network = SumNetwork(cell, in_channels=1, num_classes=3, channels=4, layers=3)
    assert any(name.endswith("running_var") for name in network.state_dict())
