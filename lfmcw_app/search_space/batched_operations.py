"""Banks: operations of one kind on several edges out of a state, evaluated together.

A bank holds the weights of one primitive of all these edges in the order of the edges, so that
channels [e·C, (e+1)·C) of its maps belong to edge e. Those of convolutions are one grouped
convolution and norm; banks of convolutions on the same edges share their norms too
(`JointConvolutions`). `LayerBank` makes a bank of any layer: correct, but not fast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from lfmcw_app.search_space.depthwise import DepthwiseConv
from lfmcw_app.search_space.layers import OperationStyle, pool
from lfmcw_app.search_space.norms import GainBatchNorm, GainGroupNorm, GainOnly
from lfmcw_app.search_space.pointwise import PointwiseConv, side_by_side

__all__ = [
    "Bank", "ConvolutionBank", "FullConvolutionBank", "JointConvolutions", "LayerBank", "Reads",
    "ReduceBank", "SharedMaps", "make_gain_norm", "pooled",
]  # fmt: skip

Reads = Literal["state", "activated", "repeated"]
"""A bank's input: the state [B, C, H, W]; the activated state, [B, C, H, W]; or the activated state
repeated for each edge, [B, E·C, H, W]. The activation is shared by all edges out of a state.
"""


class Bank(nn.Module):
    """The weights of one primitive on several edges.

    It is called with what it reads and the mixing weight of every channel, [E·C], and returns
    weight · operation for every edge, [B, E·C, H', W'].

    Attributes:
        reads: its input.
        blocks: how many edges' weights are stacked in the weight of each of its convolutions: E, or
            1 if every edge has its own layers. Spectral norm is one norm per edge.
    """

    reads: ClassVar[Reads] = "state"
    blocks: int = 1


class SharedMaps(nn.Sequential):
    """A primitive without weights: its maps of a state are the same on all edges.

    It maps [B, C, H, W] → [B, C, H', W']; each edge's mixing weight is applied in its node.
    """


def make_gain_norm(style: OperationStyle, channels: int, edges: int) -> nn.Module:
    """The norm of operations on `edges` edges, `channels` channels each: (maps, gain) → maps."""
    width = edges * channels
    if style.norm == "batch":
        return GainBatchNorm(width, running_statistics=style.running_statistics)
    if style.norm == "none":
        return GainOnly()
    return GainGroupNorm(edges if style.norm == "group" else width, width)


class ConvolutionBank(Bank):
    """A separable or dilated convolution of each of several edges.

    The activation in front of it is not part of it, since all edges out of a state share it.

    Args:
        kernel: its size.
        dilation: of the kernel; with 1 there are two convolutions in a row.
        channels: C, of one edge.
        edges: E.
        stride: of the edges.
        style: norms and activation.
    """

    reads = "repeated"

    def __init__(
        self,
        kernel: int,
        dilation: int,
        channels: int,
        edges: int,
        stride: int,
        style: OperationStyle,
    ) -> None:
        super().__init__()
        self.blocks = edges
        width = edges * channels
        # One grouped convolution replaces one convolution per edge.
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

    @property
    def convolutions(self) -> list[tuple[DepthwiseConv, PointwiseConv]]:
        """The depthwise and pointwise convolution, or two such pairs in a row."""
        kinds = DepthwiseConv, PointwiseConv
        found = [layer for layer in self.layers if isinstance(layer, kinds)]
        return cast(
            "list[tuple[DepthwiseConv, PointwiseConv]]",
            list(zip(found[::2], found[1::2], strict=True)),
        )

    def forward(self, activated: Tensor, gain: Tensor) -> Tensor:
        """Returns weight · operation for every edge, [B, E·C, H', W'].

        Args:
            activated: the activated state, repeated for each edge, [B, E·C, H, W].
            gain: the mixing weight of every channel, [E·C].
        """
        out: Tensor = self.norm(self.layers(activated), gain)
        return out


class JointConvolutions(nn.Module):
    """Several convolution banks on the same edges, with one norm for all of them.

    It holds no weights; the banks do. First halves of separable convolutions have their own norm.

    Args:
        banks: what it will be called with.
        channels: C, of one edge.
        style: norms and activation.
    """

    def __init__(
        self, banks: Sequence[ConvolutionBank], channels: int, style: OperationStyle
    ) -> None:
        super().__init__()
        edges = banks[0].blocks
        self.width = edges * channels
        halves = sum(len(bank.convolutions) == 2 for bank in banks)
        self.activation = style.make_activation()
        self.half_norm = make_gain_norm(style, channels, edges * halves) if halves else None
        self.norm = make_gain_norm(style, channels, edges * len(banks))

    def forward(self, banks: Sequence[ConvolutionBank], activated: Tensor, gain: Tensor) -> Tensor:
        """Returns weight · operation for every bank and edge, [B, banks · E·C, H', W'].

        Args:
            banks: the weights.
            activated: the activated state, repeated for each edge, [B, E·C, H, W].
            gain: the mixing weight of every channel of every bank, [banks · E·C].
        """
        given = dict.fromkeys(banks, activated)
        if self.half_norm is not None:
            separable = [bank for bank in banks if len(bank.convolutions) == 2]
            maps = self.half_norm(_convolved(separable, given, 0))
            for bank, part in zip(separable, torch.split(maps, self.width, dim=1), strict=True):
                given[bank] = self.activation(part)
        out: Tensor = self.norm(_convolved(banks, given, -1), gain)
        return out


def _convolved(
    banks: Sequence[ConvolutionBank], given: Mapping[ConvolutionBank, Tensor], position: int
) -> Tensor:
    """The outputs of the banks' convolutions at a position, side by side in the channels."""
    pairs = [bank.convolutions[position] for bank in banks]
    maps = [depth(given[bank]) for bank, (depth, _) in zip(banks, pairs, strict=True)]
    return side_by_side(maps, [point for _, point in pairs])


class FullConvolutionBank(Bank):
    """A full convolution of each of several edges; they all read the same activated state.

    Args:
        kernel: its size, odd.
        channels: C, of one edge.
        edges: E.
        stride: of the edges.
        style: norms.
    """

    reads = "activated"

    def __init__(
        self, kernel: int, channels: int, edges: int, stride: int, style: OperationStyle
    ) -> None:
        super().__init__()
        self.blocks = edges
        width = edges * channels
        self.layer: nn.Module
        if kernel == 1:
            self.layer = PointwiseConv(channels, width, stride=stride)
        else:
            self.layer = nn.Conv2d(channels, width, kernel, stride, padding=kernel // 2, bias=False)
        self.norm = make_gain_norm(style, channels, edges)

    def forward(self, activated: Tensor, gain: Tensor) -> Tensor:
        """Returns weight · operation for every edge, [B, E·C, H', W'].

        Args:
            activated: the activated state, [B, C, H, W].
            gain: the mixing weight of every channel, [E·C].
        """
        out: Tensor = self.norm(self.layer(activated), gain)
        return out


class ReduceBank(Bank):
    """The factorized reduce of each of several edges: a skip connection of stride 2.

    Args:
        channels: C, of one edge.
        edges: E.
        style: norms.
    """

    reads = "activated"

    def __init__(self, channels: int, edges: int, style: OperationStyle) -> None:
        super().__init__()
        half = channels // 2
        self.blocks = edges
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
        split = [torch.unflatten(half.permute(0, 2, 3, 1), 3, (self.blocks, -1)) for half in halves]
        joined = torch.cat(split, dim=4).flatten(3).permute(0, 3, 1, 2)
        out: Tensor = self.norm(joined, gain)
        return out


class LayerBank(Bank):
    """Any layer on each of several edges, one after the other.

    Args:
        layer: (channels, stride, style) → the layer of one edge.
        channels: C, of one edge.
        edges: E.
        stride: of the edges.
        style: norms and activation.
    """

    def __init__(
        self,
        layer: Callable[[int, int, OperationStyle], nn.Module],
        channels: int,
        edges: int,
        stride: int,
        style: OperationStyle,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.layers = nn.ModuleList(layer(channels, stride, style) for _ in range(edges))

    def forward(self, state: Tensor, gain: Tensor) -> Tensor:
        """Returns weight · operation for every edge, [B, E·C, H', W'].

        Args:
            state: [B, C, H, W].
            gain: the mixing weight of every channel, [E·C].
        """
        maps = torch.cat([layer(state) for layer in self.layers], dim=1)
        return maps * gain.view(1, -1, 1, 1)


def pooled(
    kind: Literal["max", "avg"], channels: int, stride: int, style: OperationStyle
) -> SharedMaps:
    """A pool of the supernet, with a norm behind it: pools would win by the scale of their maps."""
    if not style.pools_with_norm:
        return SharedMaps(pool(kind, stride))
    return SharedMaps(pool(kind, stride), make_gain_norm(style, channels, 1))
