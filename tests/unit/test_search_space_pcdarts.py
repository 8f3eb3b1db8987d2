"""PC-DARTS: partial channels, channel shuffle, edge weights and the genotype that they give."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lfmcw_app.search_space.cell import Cell, MixedOp
from lfmcw_app.search_space.genotype import Edge, derive_genotype
from lfmcw_app.search_space.operations import PRIMITIVES, OperationStyle
from lfmcw_app.search_space.pcdarts import PartialChannels, channel_shuffle, edge_softmax
from lfmcw_app.search_space.supernet import Architecture, Supernet

SMOOTH = ("none", "avg_pool_3x3", "skip_connect", "sep_conv_3x3", "dil_conv_3x3")


def test_the_shuffle_interleaves_groups_of_channels():
    x = torch.arange(8.0).reshape(1, 8, 1, 1)
    assert channel_shuffle(x, 4).flatten().tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert channel_shuffle(x, 2).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    maps = torch.randn(2, 6, 3, 5)
    assert torch.equal(channel_shuffle(maps, 3), F.channel_shuffle(maps, 3))


@pytest.mark.parametrize("part", [2, 4])
@pytest.mark.parametrize("stride", [1, 2])
def test_a_partial_edge_is_the_composition_of_its_parts(stride, part):
    torch.manual_seed(0)
    channels = 8
    mixed = MixedOp(channels // part, stride, PRIMITIVES, OperationStyle())
    edge = PartialChannels(mixed, part, stride).double()
    x = torch.randn(2, channels, 6, 6, dtype=torch.float64)
    alpha, beta = torch.randn(8, dtype=torch.float64).softmax(0), 0.37
    chosen = x[:, : channels // part]
    seen = sum(alpha[1 + k] * operation(chosen) for k, operation in enumerate(mixed.operations))
    others = x[:, channels // part :]
    others = F.max_pool2d(others, 2) if stride == 2 else others
    joined = torch.cat([seen, others], dim=1)
    shuffled = torch.stack(
        [joined[:, g * (channels // part) + i] for i in range(channels // part) for g in range(part)], 1
    )
    assert torch.allclose(edge(x, beta * alpha), beta * shuffled, rtol=1e-12, atol=1e-12)


def test_channels_that_cannot_be_split_are_refused():
    with pytest.raises(ValueError, match="6 channels cannot be split into 4"):
        Supernet(in_channels=1, num_classes=2, channels=6, layers=3, nodes=1, partial_channels=4)


def test_edge_weights_sum_to_one_over_the_edges_into_a_node():
    logits = torch.randn(14)
    expected = [logits[a:b].softmax(0) for a, b in ((0, 2), (2, 5), (5, 9), (9, 14))]
    assert torch.equal(edge_softmax(logits, 4), torch.cat(expected))


def test_edge_weights_multiply_the_outputs_of_edges():
    torch.manual_seed(0)
    cell = Cell(
        (4, 4), 4, nodes=2, reduces=True, reduced_before=False, primitives=[SMOOTH] * 5, style=OperationStyle(),
        partial_channels=2,
    ).double()  # fmt: skip
    arch = Architecture(2, SMOOTH, scale=1.0, edge_weights=True).double()
    x, y = torch.randn(2, 2, 4, 8, 8, dtype=torch.float64)
    out = cell(x, y, arch().reduction)
    alpha, beta = arch.reduction.softmax(-1), edge_softmax(arch.reduction_edges, 2)
    states = [cell.preprocess0(x), cell.preprocess1(y)]
    states.append(sum(beta[row] * cell.edges[row](states[row], alpha[row]) for row in (0, 1)))
    states.append(
        sum(beta[2 + source] * cell.edges[2 + source](states[source], alpha[2 + source]) for source in range(3))
    )
    assert torch.allclose(out, torch.cat(states[2:], 1), rtol=1e-10, atol=1e-12)


def set_architecture(arch, alpha, beta):
    """Sets the logits of which `alpha` and `beta` are the softmax, in both kinds of cell."""
    with torch.no_grad():
        for logits in (arch.normal, arch.reduction):
            logits.copy_(torch.tensor(alpha).log())
        for logits in (arch.normal_edges, arch.reduction_edges):
            logits.copy_(torch.tensor(beta).log())


def test_derivation_ranks_by_the_product_of_both_softmaxes():
    arch = Architecture(2, ("none", "skip_connect", "sep_conv_3x3"), edge_weights=True).double()
    alpha = [
        [0.1, 0.3, 0.6], [0.98, 0.015, 0.005],  # both edges into node 0 are kept, `none` or not
        [0.05, 0.05, 0.9], [0.2, 0.5, 0.3], [0.6, 0.15, 0.25],
    ]  # fmt: skip
    set_architecture(arch, alpha, [0.01, 0.99, 0.1, 0.3, 0.6])
    # Into node 1: .9 · .1 = .09 < .5 · .3 and .25 · .6 = .15; without β the first would be the strongest.
    kept = (Edge("sep_conv_3x3", 0), Edge("skip_connect", 1), Edge("skip_connect", 1), Edge("sep_conv_3x3", 2))
    assert derive_genotype(arch(), arch.primitives).normal == kept
    assert derive_genotype(arch(), arch.primitives).reduction == kept
    set_architecture(arch, alpha, [0.01, 0.99, 1 / 3, 1 / 3, 1 / 3])
    assert derive_genotype(arch(), arch.primitives).normal[2:] == (Edge("sep_conv_3x3", 0), Edge("skip_connect", 1))


def test_derivation_with_edge_weights_breaks_ties_by_order():
    arch = Architecture(2, PRIMITIVES, scale=0.0, edge_weights=True)
    assert derive_genotype(arch(), arch.primitives).normal == tuple(Edge("max_pool_3x3", s) for s in (0, 1, 0, 1))
