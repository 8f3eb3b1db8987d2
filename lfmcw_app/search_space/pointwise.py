"""1×1 convolutions in groups, on channels-last maps: one matrix product per group."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lfmcw_app.search_space.requested_gradients import gradient_requested, recorded_by_autograd

__all__ = ["PointwiseConv", "grouped_linear"]

DENSE_CHANNELS = 32
"""Up to so many channels, one product with a block-diagonal matrix is fastest on a CPU."""


class PointwiseConv(nn.Conv2d):
    """A 1×1 convolution of each of `groups` groups of channels by itself.

    It maps [B, G·C, H, W] → [B, G·C', ⌈H/s⌉, ⌈W/s⌉].

    It is a matrix product also where there is one group. With few channels, channels last and
    stride 2, oneDNN's own gradient (torch 2.14.1) writes beyond its buffers.
    """

    def __init__(
        self, channels_in: int, channels_out: int, *, groups: int = 1, stride: int = 1
    ) -> None:
        super().__init__(
            groups * channels_in, groups * channels_out, 1, stride, groups=groups, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """Convolves `x`."""
        # A strided 1×1 convolution is one of the pixels that it keeps.
        stride = self.stride[0]
        if stride > 1:
            x = x[:, :, ::stride, ::stride]
        batch, channels, height, width = x.shape
        weight = self.weight.view(self.groups, self.out_channels // self.groups, -1)
        pixels = x.permute(0, 2, 3, 1).reshape(-1, self.groups, channels // self.groups)
        return grouped_linear(pixels, weight).view(batch, height, width, -1).permute(0, 3, 1, 2)


def grouped_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Returns y[p, g] = weight[g] x[p, g] for `x` [P, G, I] and `weight` [G, O, I]: [P, G, O]."""
    groups, outputs, inputs = weight.shape
    if groups == 1:
        return F.linear(x, weight[0])
    if groups * max(inputs, outputs) <= DENSE_CHANNELS:
        # weight[g] in the g-th block of the diagonal of [G·O, G·I].
        diagonal = torch.eye(groups, dtype=weight.dtype, device=weight.device)
        blocks = diagonal.view(groups, 1, groups, 1) * weight.unsqueeze(2)
        dense = blocks.view(groups * outputs, groups * inputs)
        return F.linear(x.flatten(1), dense).view(-1, groups, outputs)
    return _products(x, weight)


def _products(x: Tensor, weight: Tensor) -> Tensor:
    if recorded_by_autograd(x, weight):
        out: Tensor = _GroupedLinear.apply(x, weight)
        return out
    return _multiply(x, weight)


def _multiply(x: Tensor, weight: Tensor) -> Tensor:
    """The products themselves.

    A plain `torch.bmm` has its groups first, and would be followed by a transposing copy each way.
    """
    out = x.new_empty(len(x), *weight.shape[:2])
    torch.bmm(x.transpose(0, 1), weight.transpose(1, 2), out=out.transpose(0, 1))
    return out


class _GroupedLinear(torch.autograd.Function):
    """(x, w) → y. Its gradients, a product with wᵀ and a sum of outer products, stay in kind."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (g,) = ctx.saved_tensors, grads
        gx = _products(g, weight.transpose(1, 2)) if gradient_requested(ctx, 0) else None
        gw = (
            torch.bmm(g.permute(1, 2, 0), x.transpose(0, 1)) if gradient_requested(ctx, 1) else None
        )
        return gx, gw
