"""PC-DARTS: the shuffle of partly mixed channels, and the weights of edges.

The partial channels themselves are in `cell.py`.

Reference: Xu et al., PC-DARTS: Partial Channel Connections for Memory-Efficient Architecture Search
(2020), section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["channel_shuffle", "edge_softmax"]


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleaves groups of channels: output i · groups + g is channel i of group g.

    Args:
        x: [B, C, H, W], C a multiple of `groups`.
        groups: number of groups.

    Reference: Zhang et al., ShuffleNet (2018).
    """
    # On channels-last memory, so that the result is channels last again.
    pixels = torch.unflatten(x.permute(0, 2, 3, 1), 3, (groups, -1))
    return pixels.transpose(3, 4).flatten(3).permute(0, 3, 1, 2)


def edge_softmax(logits: Tensor, nodes: int) -> Tensor:
    """Returns the weights of the edges, [edges]: a softmax of β over each node's edges."""
    incoming = torch.split(logits, [2 + node for node in range(nodes)])
    return torch.cat([edges.softmax(dim=0) for edges in incoming])
