"""Operations of one kind on several edges out of a state, as one grouped convolution and norm.

The edges that leave a state read the same maps. Their activation and pools are computed once, and a
bank holds the weights of one primitive of all these edges in the order of the edges, so that
channels [e·C, (e+1)·C) belong to edge e.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lfmcw_app.search_space.depthwise import DepthwiseConv
from lfmcw_app.search_space.norms import GainBatchNorm, GainGroupNorm, GainOnly
from lfmcw_app.search_space.operations import PRIMITIVES, OperationStyle
from lfmcw_app.search_space.pointwise import PointwiseConv
from mlo.errors import nearest

__all__ = [
    "CONVOLUTIONS", "ConvolutionBank", "OutgoingEdges", "ReduceBank", "blocks_of_convolutions",
    "make_gain_norm",
]  # fmt: skip

CONVOLUTIONS = {
    "sep_conv_3x3": (3, 1),
    "sep_conv_5x5": (5, 1),
    "dil_conv_3x3": (3, 2),
    "dil_conv_5x5": (5, 2),
}
"""Kernel and dilation of the primitives with convolutions; those with dilation 1 come twice."""


def make_gain_norm(style: OperationStyle, channels: int, edges: int) -> nn.Module:
    """The norm of operations on `edges` edges, `channels` channels each: (maps, gain) → maps."""
    width = edges * channels
    if style.norm == "batch":
        return GainBatchNorm(width)
    if style.norm == "none":
        return GainOnly()
    return GainGroupNorm(edges if style.norm == "group" else width, width)


class ConvolutionBank(nn.Module):
    """A separable or dilated convolution of each of several edges.

    The activation in front of it is not part of it, since all edges out of a state share it.

    Args:
        primitive: one of `CONVOLUTIONS`.
        channels: C, of one edge.
        edges: E.
        stride: of the edges.
        style: norms and activation.
    """

    def __init__(
        self, primitive: str, channels: int, edges: int, stride: int, style: OperationStyle
    ) -> None:
        super().__init__()
        kernel, dilation = CONVOLUTIONS[primitive]
        self.edges = edges
        width = edges * channels
        # One convolution in groups does for all edges what each would do by itself.
        layers: list[nn.Module] = []
        if dilation == 1:
            layers += [
                DepthwiseConv(width, kernel, stride=stride),
                PointwiseConv(channels, channels, groups=edges),
                make_gain_norm(style, channels, edges),
                style.make_activation(),
            ]
            stride = 1
        layers += [
            DepthwiseConv(width, kernel, stride=stride, dilation=dilation),
            PointwiseConv(channels, channels, groups=edges),
        ]
        self.layers = nn.Sequential(*layers)
        self.norm = make_gain_norm(style, channels, edges)

    def forward(self, activated: Tensor, gain: Tensor) -> Tensor:
        """Returns weight · operation for every edge, [B, E·C, H', W'].

        Args:
            activated: the activated state, repeated for each edge, [B, E·C, H, W].
            gain: the mixing weight of every channel, [E·C].
        """
        out: Tensor = self.norm(self.layers(activated), gain)
        return out


class ReduceBank(nn.Module):
    """The factorized reduce of each of several edges: a skip connection of stride 2.

    Args:
        channels: C, of one edge.
        edges: E.
        style: norms.
    """

    def __init__(self, channels: int, edges: int, style: OperationStyle) -> None:
        super().__init__()
        half = channels // 2
        self.edges = edges
        self.even = PointwiseConv(channels, edges * half, stride=2)
        self.odd = PointwiseConv(channels, edges * (channels - half), stride=2)
        self.norm = make_gain_norm(style, channels, edges)

    def forward(self, activated: Tensor, gain: Tensor) -> Tensor:
        """Returns weight · operation for every edge, [B, E·C, H/2, W/2].

        Args:
            activated: the activated state, [B, C, H, W]; the edges' convolutions all read it.
            gain: the mixing weight of every channel, [E·C].
        """
        halves = (self.even(activated), self.odd(activated[:, :, 1:, 1:]))
        split = [torch.unflatten(half.permute(0, 2, 3, 1), 3, (self.edges, -1)) for half in halves]
        joined = torch.cat(split, dim=4).flatten(3).permute(0, 3, 1, 2)
        out: Tensor = self.norm(joined, gain)
        return out


class OutgoingEdges(nn.Module):
    """All edges that leave one state of a cell.

    Args:
        channels: C, of the state.
        stride: of the edges.
        primitives: the candidates of each edge.
        style: norms and activation.

    Raises:
        ValueError: for an unknown primitive.

    Attributes:
        banks: primitive → the weights of it on all edges that have it.
        edges: primitive → the positions of these edges.
        shared: the primitives without weights, which are the same on all edges.
    """

    def __init__(
        self, channels: int, stride: int, primitives: Sequence[Sequence[str]], style: OperationStyle
    ) -> None:
        super().__init__()
        # `none` adds zero to every sum and gradient: it takes part in the softmax only.
        found = {name for edge in primitives for name in edge if name != "none"}
        self.edges: dict[str, tuple[int, ...]] = {}
        for name in sorted(found):
            self.edges[name] = tuple(e for e, names in enumerate(primitives) if name in names)

        self.channels, self.stride = channels, stride
        self.activation = style.make_activation()
        self.banks = nn.ModuleDict()
        self.pools = nn.ModuleDict()
        for name, edges in self.edges.items():
            if name in CONVOLUTIONS:
                self.banks[name] = ConvolutionBank(name, channels, len(edges), stride, style)
            elif name == "skip_connect" and stride == 2:
                self.banks[name] = ReduceBank(channels, len(edges), style)
            elif name == "max_pool_3x3":
                self.pools[name] = nn.Sequential(
                    nn.MaxPool2d(3, stride, padding=1), make_gain_norm(style, channels, 1)
                )
            elif name == "avg_pool_3x3":
                pool = nn.AvgPool2d(3, stride, padding=1, count_include_pad=False)
                self.pools[name] = nn.Sequential(pool, make_gain_norm(style, channels, 1))
            elif name != "skip_connect":  # with stride 1 it is the state itself
                raise ValueError(f"Unknown primitive {name!r}. {nearest(name, PRIMITIVES)}")
        self.shared = tuple(name for name in self.edges if name not in self.banks)

    def forward(
        self, state: Tensor, weights: Sequence[Tensor]
    ) -> tuple[dict[tuple[int, ...], Tensor], dict[str, Tensor]]:
        """Evaluates the operations.

        Args:
            state: [B, C, H, W].
            weights: for every bank the mixing weights of its edges.

        Returns:
            edges → the weighted sum of the operations that have weights, for every set of edges
            that some of them are on, [B, len(edges)·C, H', W']; and primitive → what it makes of
            the state, for those without weights.
        """
        # Operations with weights: the weights of a bank are applied by its norm, and banks on the
        # same edges are added up.
        sums: dict[tuple[int, ...], Tensor] = {}
        if self.banks:
            activated = self.activation(state)
            repeated: dict[tuple[int, ...], Tensor] = {}
            for (name, bank), chosen in zip(self.banks.items(), weights, strict=True):
                edges = self.edges[name]
                gain = chosen.repeat_interleave(self.channels)
                if isinstance(bank, ReduceBank):
                    out = bank(activated, gain)
                else:
                    if edges not in repeated:
                        repeated[edges] = _repeated(activated, len(edges))
                    out = bank(repeated[edges], gain)
                sums[edges] = sums[edges] + out if edges in sums else out

        # The others give every edge the same maps; each edge's weights are applied in its node.
        shared = {
            name: self.pools[name](state) if name in self.pools else state for name in self.shared
        }
        return sums, shared


def blocks_of_convolutions(root: nn.Module) -> dict[nn.Module, int]:
    """Returns, for every convolution of a bank in `root`, the number of its edges.

    The edges' weights stand below one another in its own.
    """
    return {
        layer: bank.edges
        for bank in root.modules()
        if isinstance(bank, (ConvolutionBank, ReduceBank))
        for layer in bank.modules()
        if isinstance(layer, nn.Conv2d)
    }


def _repeated(x: Tensor, times: int) -> Tensor:
    """[B, C, H, W] → [B, times·C, H, W], with the channels last in memory.

    (`Tensor.repeat` would put them first.)
    """
    if times == 1:
        return x
    pixels = x.permute(0, 2, 3, 1).unsqueeze(3)
    return pixels.expand(-1, -1, -1, times, -1).flatten(3).permute(0, 3, 1, 2)
