"""The layers that operations are made of, each for one edge, and what all operations share.

Reference: Liu et al., DARTS (2019), section 3 and appendix A.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from lfmcw_app.search_space.pointwise import PointwiseConv

__all__ = [
    "FactorizedReduce",
    "GaussianNoise",
    "Norm",
    "OperationStyle",
    "ReLUConvNorm",
    "dilated",
    "pool",
    "separable",
]

Norm = Literal["batch", "group", "instance", "none"]


@dataclass(frozen=True, kw_only=True)
class OperationStyle:
    """What the layers of all operations of a network have in common.

    Attributes:
        norm: "batch" for classifiers. "group" (one group) for the discriminator: BatchNorm without
            affine parameters fixes the mean feature of a batch, so real and generated batches that
            are fed separately look alike.
        affine: whether norms learn scale and shift: yes in a derived network; no in a supernet,
            where they would undo the mixing weights.
        activation: "relu", or "silu" for a smooth network in which finite differences of gradients
            are accurate.
        pools_with_norm: whether a supernet's pools have a norm behind them, as in DARTS.
        running_statistics: whether BatchNorms keep them for evaluation: not in a supernet, which
            always normalises by its batch.
    """

    norm: Norm = "batch"
    affine: bool = False
    activation: Literal["relu", "silu"] = "relu"
    pools_with_norm: bool = True
    running_statistics: bool = True

    def make_norm(self, channels: int) -> nn.Module:
        """A normalisation layer over `channels`."""
        if self.norm == "batch":
            return nn.BatchNorm2d(
                channels, affine=self.affine, track_running_stats=self.running_statistics
            )
        if self.norm == "none":
            return nn.Identity()
        # Over all channels of an image, or over each by itself.
        return nn.GroupNorm(1 if self.norm == "group" else channels, channels, affine=self.affine)

    def make_activation(self) -> nn.Module:
        """An activation; not in place, since several edges read the same node."""
        return nn.ReLU() if self.activation == "relu" else nn.SiLU()


class ReLUConvNorm(nn.Sequential):
    """Activation, 1×1 convolution, norm: [B, C_in, H, W] → [B, C_out, H, W]."""

    def __init__(self, channels_in: int, channels_out: int, style: OperationStyle) -> None:
        super().__init__(
            style.make_activation(),
            PointwiseConv(channels_in, channels_out),
            style.make_norm(channels_out),
        )


class FactorizedReduce(nn.Module):
    """Halves the resolution by two 1×1 convolutions on pixel grids one apart.

    It maps [B, C, H, W] → [B, C', H/2, W/2].
    """

    def __init__(self, channels_in: int, channels_out: int, style: OperationStyle) -> None:
        super().__init__()
        self.activation = style.make_activation()
        self.even = PointwiseConv(channels_in, channels_out // 2, stride=2)
        self.odd = PointwiseConv(channels_in, channels_out - channels_out // 2, stride=2)
        self.norm = style.make_norm(channels_out)

    def forward(self, x: Tensor) -> Tensor:
        """Reduces `x`, whose height and width must be even."""
        x = self.activation(x)
        out: Tensor = self.norm(torch.cat([self.even(x), self.odd(x[:, :, 1:, 1:])], dim=1))
        return out


def _depthwise(channels: int, kernel: int, stride: int, dilation: int) -> list[nn.Module]:
    """A depthwise convolution that keeps (or halves) the resolution, and a pointwise one."""
    padding = dilation * (kernel // 2)
    return [
        nn.Conv2d(
            channels, channels, kernel, stride, padding, dilation, groups=channels, bias=False
        ),
        nn.Conv2d(channels, channels, 1, bias=False),
    ]


def separable(channels: int, kernel: int, stride: int, style: OperationStyle) -> nn.Module:
    """Activation, depthwise, pointwise, norm, twice; the stride is in the first."""
    layers: list[nn.Module] = []
    for s in (stride, 1):
        layers += [
            style.make_activation(),
            *_depthwise(channels, kernel, s, 1),
            style.make_norm(channels),
        ]
    return nn.Sequential(*layers)


def dilated(channels: int, kernel: int, stride: int, style: OperationStyle) -> nn.Module:
    """Activation, depthwise with dilation 2, pointwise, norm."""
    return nn.Sequential(
        style.make_activation(), *_depthwise(channels, kernel, stride, 2), style.make_norm(channels)
    )


def pool(kind: Literal["max", "avg"], stride: int) -> nn.Module:
    """A 3×3 pool."""
    if kind == "max":
        return nn.MaxPool2d(3, stride=stride, padding=1)
    return nn.AvgPool2d(3, stride=stride, padding=1, count_include_pad=False)


class GaussianNoise(nn.Module):
    """Standard normal noise in place of the input, halved in resolution by a stride of 2.

    Reference: Zela et al., Understanding and Robustifying Differentiable Architecture Search
    (2020), section 3.1 (space S4).
    """

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Returns noise [B, C, H / stride, W / stride] for `x` [B, C, H, W]."""
        return torch.randn_like(x[:, :, :: self.stride, :: self.stride])
