"""PC-DARTS: an edge whose operations see a part of the channels, and normalised weights of the edges.

Reference: Xu et al., PC-DARTS: Partial Channel Connections for Memory-Efficient Architecture Search (2020), section 3.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["PartialChannels", "channel_shuffle", "edge_softmax"]


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleaves `groups` equal groups of channels: output channel i · groups + g is channel i of group g.

    Args:
        x: [B, C, H, W], C a multiple of `groups`.
        groups: number of groups.

    Reference: Zhang et al., ShuffleNet (2018).
    """
    batch, channels, height, width = x.shape
    grouped = x.reshape(batch, groups, channels // groups, height, width)
    return grouped.transpose(1, 2).reshape(batch, channels, height, width)


class PartialChannels(nn.Module):
    """An edge that mixes operations on the first C / K channels and lets the others pass; shuffled, the next edge mixes others.

    Args:
        edge: a mixed op for C / K channels and the same stride.
        proportion: K.
        stride: 1, or 2: then the others are max-pooled.
    """

    def __init__(self, edge: nn.Module, proportion: int, stride: int) -> None:
        super().__init__()
        self.edge = edge
        self.proportion = proportion
        self.bypass = nn.Identity() if stride == 1 else nn.MaxPool2d(2)

    def forward(self, x: Tensor, weights: Tensor, skip_drop_probability: float = 0.0) -> Tensor:
        """Returns [B, C, H / stride, W / stride].

        Args:
            x: [B, C, H, W], C a multiple of K.
            weights: β · softmax(α) of this edge, [primitives].
            skip_drop_probability: of the mixed op.
        """
        width = x.shape[1] // self.proportion
        mixed = self.edge(x[:, :width], weights, skip_drop_probability)
        # β multiplies the whole edge. It is the sum of the weights, since softmax(α) sums to one; they carry it already.
        passed = weights.sum() * self.bypass(x[:, width:])
        return channel_shuffle(torch.cat([mixed, passed], dim=1), self.proportion)


def edge_softmax(logits: Tensor, nodes: int) -> Tensor:
    """Returns the weights of the edges, [edges], from their logits β: a softmax over the incoming edges of each node."""
    incoming = torch.split(logits, [2 + node for node in range(nodes)])
    return torch.cat([edges.softmax(dim=0) for edges in incoming])
