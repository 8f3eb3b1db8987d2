"""PC-DARTS: channel shuffle and edge weights."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from lfmcw_app.search_space.pcdarts import channel_shuffle, edge_softmax


def test_the_shuffle_interleaves_groups_of_channels():
    x = torch.arange(8.0).reshape(1, 8, 1, 1)
    assert channel_shuffle(x, 4).flatten().tolist() == [0, 2, 4, 6, 1, 3, 5, 7]
    assert channel_shuffle(x, 2).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    maps = torch.randn(2, 6, 3, 5)
    assert torch.equal(channel_shuffle(maps, 3), F.channel_shuffle(maps, 3))


def test_edge_weights_sum_to_one_over_the_edges_into_a_node():
    logits = torch.randn(14)
    expected = [logits[a:b].softmax(0) for a, b in ((0, 2), (2, 5), (5, 9), (9, 14))]
    assert torch.equal(edge_softmax(logits, 4), torch.cat(expected))
