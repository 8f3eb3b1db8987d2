"""1×1 convolutions in groups, on channels-last maps: one matrix product per group."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lfmcw_app.search_space.requested_gradients import (
    autocasted,
    gradient_requested,
    recorded_by_autograd,
)

__all__ = ["PointwiseConv", "grouped_linear", "side_by_side"]

DENSE_CHANNELS = 32
"""Up to this many channels, one product with a block-diagonal matrix is fastest on a CPU."""


class PointwiseConv(nn.Conv2d):
    """A 1×1 convolution of each of `groups` groups of channels by itself.

    It maps [B, G·C, H, W] → [B, G·C', ⌈H/s⌉, ⌈W/s⌉].

    It is a matrix product even for one group. With few channels, channels last and stride 2,
    oneDNN's own gradient (torch 2.14.1) writes beyond its buffers.
    """

    def __init__(
        self, channels_in: int, channels_out: int, *, groups: int = 1, stride: int = 1
    ) -> None:
        super().__init__(
            groups * channels_in, groups * channels_out, 1, stride, groups=groups, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """Convolves `x`."""
        return side_by_side([x], [self])


def side_by_side(maps: Sequence[Tensor], layers: Sequence[PointwiseConv]) -> Tensor:
    """Convolves every map by its own layer; the results are one map, their channels in a row.

    Args:
        maps: for every layer its input, all of one size and number of images.
        layers: of one stride, and of equally many channels per group.
    """
    # A strided 1×1 convolution is a convolution of the pixels that it keeps.
    stride = layers[0].stride[0]
    if stride > 1:
        maps = [x[:, :, ::stride, ::stride] for x in maps]
    batch, _, height, width = maps[0].shape
    pixels, weights = [], []
    for x, layer in zip(maps, layers, strict=True):
        groups = layer.groups
        pixels.append(x.permute(0, 2, 3, 1).reshape(-1, groups, x.shape[1] // groups))
        weights.append(layer.weight.view(groups, layer.out_channels // groups, -1))
    out = grouped_linear(pixels, weights)
    return out.view(batch, height, width, -1).permute(0, 3, 1, 2)


def grouped_linear(maps: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Returns y[p, g] = weight[g] x[p, g] for `maps` x [P, G, I] and `weights` [G, O, I].

    There may be several of them. Their groups stand in a row in the result, [P, ΣG, O].
    """
    _, outputs, inputs = weights[0].shape
    groups = sum(map(len, weights))
    if groups == 1:
        return F.linear(maps[0], weights[0].view(outputs, inputs))
    if groups * max(inputs, outputs) <= DENSE_CHANNELS:
        x = maps[0] if len(maps) == 1 else torch.cat(list(maps), dim=1)
        weight = weights[0] if len(weights) == 1 else torch.cat(list(weights))
        # weight[g] in the g-th block of the diagonal of [G·O, G·I].
        diagonal = torch.eye(groups, dtype=weight.dtype, device=weight.device)
        blocks = diagonal.view(groups, 1, groups, 1) * weight.unsqueeze(2)
        dense = blocks.view(groups * outputs, groups * inputs)
        return F.linear(x.flatten(1), dense).view(-1, groups, outputs)
    return _products(autocasted(*maps), autocasted(*weights))


def _products(maps: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    if recorded_by_autograd(*maps, *weights):
        out: Tensor = _GroupedLinear.apply(len(maps), *maps, *weights)
        return out
    return _multiply(maps, weights)


def _multiply(maps: Sequence[Tensor], weights: Sequence[Tensor]) -> Tensor:
    """The products themselves.

    A plain `torch.bmm` has its groups first, and would be followed by a transposing copy each way.
    A compiler, which does not take a part of a tensor for `out`, plans its memory itself.
    """
    if torch.compiler.is_compiling():
        products = [
            torch.bmm(x.transpose(0, 1), weight.transpose(1, 2)).transpose(0, 1)
            for x, weight in zip(maps, weights, strict=True)
        ]
        return torch.cat(products, dim=1)
    sizes = [len(weight) for weight in weights]
    out = maps[0].new_empty(len(maps[0]), sum(sizes), weights[0].shape[1])
    for x, weight, part in zip(maps, weights, torch.split(out, sizes, dim=1), strict=True):
        torch.bmm(x.transpose(0, 1), weight.transpose(1, 2), out=part.transpose(0, 1))
    return out


class _GroupedLinear(torch.autograd.Function):
    """(x, …, w, …) → y. Its gradients, products with wᵀ and sums of outer ones, stay in kind."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> Tensor:
        ctx.count = count
        ctx.save_for_backward(*tensors)
        return _multiply(tensors[:count], tensors[count:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors, count = ctx.saved_tensors, ctx.count
        maps, weights = tensors[:count], tensors[count:]
        parts = torch.split(grads[0], [len(weight) for weight in weights], dim=1)
        of_maps: list[Tensor | None] = [None] * count
        of_weights: list[Tensor | None] = [None] * count
        for index, (x, weight, g) in enumerate(zip(maps, weights, parts, strict=True)):
            if gradient_requested(ctx, index):
                of_maps[index] = _products([g], [weight.transpose(1, 2)])
            if gradient_requested(ctx, count + index):
                of_weights[index] = torch.bmm(g.permute(1, 2, 0), x.transpose(0, 1))
        return None, *of_maps, *of_weights
