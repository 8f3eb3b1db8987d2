"""PC-DARTS: partial channels, channel shuffle, edge weights and the genotype that they give."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from lfmcw_app.search_space.genotype import Edge, derive_genotype
from lfmcw_app.search_space.operations import PRIMITIVES
from lfmcw_app.search_space.pcdarts import channel_shuffle, edge_softmax
from lfmcw_app.search_space.supernet import Architecture, Supernet


def test_the_shuffle_interleaves_groups_of_channels():
    x = torch.arange(8.0).reshape(1, 8, 1, 1)
    assert channel_shuffle(x, 4).flatten().tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert channel_shuffle(x, 2).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    maps = torch.randn(2, 6, 3, 5)
    assert torch.equal(channel_shuffle(maps, 3), F.channel_shuffle(maps, 3))


def test_channels_that_cannot_be_split_are_refused():
    with pytest.raises(ValueError, match="6 channels cannot be split into 4"):
        Supernet(in_channels=1, num_classes=2, channels=6, layers=3, nodes=1, partial_channels=4)


def test_edge_weights_sum_to_one_over_the_edges_into_a_node():
    logits = torch.randn(14)
    expected = [logits[a:b].softmax(0) for a, b in ((0, 2), (2, 5), (5, 9), (9, 14))]
    assert torch.equal(edge_softmax(logits, 4), torch.cat(expected))


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
    # Into node 1: .9 · .1 = .09 < .5 · .3 and .25 · .6 = .15; without β the first would be the
    # strongest.
    kept = (
        Edge("sep_conv_3x3", 0),
        Edge("skip_connect", 1),
        Edge("skip_connect", 1),
        Edge("sep_conv_3x3", 2),
    )
    assert derive_genotype(arch(), arch.primitives).normal == kept
    assert derive_genotype(arch(), arch.primitives).reduction == kept
    set_architecture(arch, alpha, [0.01, 0.99, 1 / 3, 1 / 3, 1 / 3])
    assert derive_genotype(arch(), arch.primitives).normal[2:] == (
        Edge("sep_conv_3x3", 0),
        Edge("skip_connect", 1),
    )


def test_derivation_with_edge_weights_breaks_ties_by_order():
    arch = Architecture(2, PRIMITIVES, scale=0.0, edge_weights=True)
    assert derive_genotype(arch(), arch.primitives).normal == tuple(
        Edge("max_pool_3x3", s) for s in (0, 1, 0, 1)
    )
