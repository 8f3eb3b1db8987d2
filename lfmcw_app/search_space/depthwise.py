"""Depthwise convolution with fast gradients at every order.

y = x ∗ w is bilinear, so its gradients are bilinear again and the three maps are closed under
differentiation:

    y  = depthwise(x, w)            y[p] = Σ_k w[k] x[s·p + d·k]
    gx = input_gradient(w, g)       gx[q] = Σ_k w[k] g[p] over q = s·p + d·k
    gw = weight_gradient(x, g)      gw[k] = Σ_p x[s·p + d·k] g[p]

At stride 1 the second is depthwise(g, flipped w). PyTorch's own double backward goes through the
channels one by one, on every device.

On a CPU, oneDNN (torch 2.14.1) has fast kernels for the first at every dilation. It does not use
them for the input's gradient at dilation 2 (5 to 8 times slower), nor for the weight's at dilation
2 (15 times) and for kernels wider than 3 (2 to 6 times on large maps). In these cases the first is
used in place of the second, and the third is split into pieces of dilation 1 and kernel 3. (The
functions do not support `torch.func`.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lfmcw_app.search_space.requested_gradients import (
    autocasted,
    gradient_requested,
    recorded_by_autograd,
)

__all__ = ["LARGE", "DepthwiseConv", "depthwise"]

LARGE = 2**17
"""Entries of a map from which four 3×3 filters' gradients are faster than one 5×5's, on a CPU."""


class DepthwiseConv(nn.Conv2d):
    """One k×k filter per channel, k odd: [B, C, H, W] → [B, C, H', W'].

    It keeps the resolution, or halves it with stride 2.
    """

    def __init__(self, channels: int, kernel: int, *, stride: int = 1, dilation: int = 1) -> None:
        padding = dilation * (kernel // 2)
        super().__init__(
            channels, channels, kernel, stride, padding, dilation, groups=channels, bias=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """Convolves `x`."""
        return depthwise(x, self.weight, stride=self.stride[0], dilation=self.dilation[0])


def depthwise(x: Tensor, weight: Tensor, *, stride: int = 1, dilation: int = 1) -> Tensor:
    """Returns `x` [B, C, H, W] convolved with `weight` [C, 1, k, k], k odd.

    The padding is dilation · (k − 1) / 2.
    """
    if stride == dilation == 2:
        # Every tap falls on an even row and column.
        x, stride, dilation = x[:, :, ::2, ::2], 1, 1
    if not recorded_by_autograd(x, weight):
        return _convolution(x, weight, stride, dilation)
    x, weight = autocasted(x, weight)
    out: Tensor = _Depthwise.apply(x, weight.view_as(weight), stride, dilation)
    return out


def _convolution(x: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
    padding = dilation * (weight.shape[-1] // 2)
    return F.conv2d(_fast_format(x), weight, None, stride, padding, dilation, len(weight))


def _fast_format(x: Tensor) -> Tensor:
    """The maps with channels first, where that is faster: in double precision on a CPU.

    It has no oneDNN kernels; PyTorch's own are three to four times faster so.
    """
    return x.contiguous() if x.dtype == torch.float64 and x.device.type == "cpu" else x


class _Depthwise(torch.autograd.Function):
    """(x, w) → x ∗ w."""

    # Without `setup_context`, for which PyTorch reads the signature at every call: 34 µs, not 4.
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, stride: int, dilation: int) -> Tensor:
        ctx.stride, ctx.dilation = stride, dilation
        ctx.save_for_backward(x, weight)
        return _convolution(x, weight, stride, dilation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), (g,) = ctx.saved_tensors, grads
        in_x, in_weight = gradient_requested(ctx, 0), gradient_requested(ctx, 1)
        how = ctx.stride, ctx.dilation

        # The gradients will be differentiated: each is a function of this module again.
        if torch.is_grad_enabled():
            gx = _input_gradient(x, weight, g, *how) if in_x else None
            gw = _WeightGradient.apply(x, g, weight.shape[-1], *how) if in_weight else None
            return gx, gw, None, None

        # Where PyTorch's own are fast, both come from one call.
        if not _in_pieces(x, weight.shape[-1], *how):
            return *_native(x, weight, g, *how, which=(in_x, in_weight)), None, None
        gx = _input_gradient(x, weight, g, *how) if in_x else None
        gw = _weight_gradient(x, g, weight.shape[-1], *how) if in_weight else None
        return gx, gw, None, None


class _InputGradient(torch.autograd.Function):
    """(w, g) → Σ_k w[k] g[p] over q = s·p + d·k, [B, C, H, W]: the shape of the input."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, g: Tensor, shape: torch.Size, stride: int, dilation: int
    ) -> Tensor:
        ctx.stride, ctx.dilation = stride, dilation
        ctx.save_for_backward(weight, g)
        # Only its shape and the order of its memory are read.
        x = torch.empty(shape, dtype=g.dtype, device=g.device, memory_format=torch.channels_last)
        return _input_gradient(x, weight, g, stride, dilation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (weight, g), (v,) = ctx.saved_tensors, grads
        how = ctx.stride, ctx.dilation
        # ⟨v, gx⟩ = ⟨v ∗ w, g⟩: linear in w as v's convolution is, and in g.
        gw = (
            _WeightGradient.apply(v, g, weight.shape[-1], *how)
            if gradient_requested(ctx, 0)
            else None
        )
        gg = (
            depthwise(v, weight, stride=ctx.stride, dilation=ctx.dilation)
            if gradient_requested(ctx, 1)
            else None
        )
        return gw, gg, None, None, None


class _WeightGradient(torch.autograd.Function):
    """(x, g) → Σ_p x[s·p + d·k] g[p], [C, 1, k, k]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, g: Tensor, kernel: int, stride: int, dilation: int) -> Tensor:
        ctx.stride, ctx.dilation = stride, dilation
        ctx.save_for_backward(x, g)
        return _weight_gradient(x, g, kernel, stride, dilation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, g), (v,) = ctx.saved_tensors, grads
        how = ctx.stride, ctx.dilation
        # ⟨v, gw⟩ = ⟨v ∗ x, g⟩: linear in x as the convolution with v is, and in g.
        gx = _input_gradient(x, v, g, *how) if gradient_requested(ctx, 0) else None
        gg = (
            depthwise(x, v, stride=ctx.stride, dilation=ctx.dilation)
            if gradient_requested(ctx, 1)
            else None
        )
        return gx, gg, None, None, None


def _input_gradient(x: Tensor, weight: Tensor, g: Tensor, stride: int, dilation: int) -> Tensor:
    """The transpose of x → x ∗ w, applied to `g`."""
    if stride == 1:
        return depthwise(g, weight.flip(2, 3), dilation=dilation)
    if recorded_by_autograd(weight, g):
        made: Tensor = _InputGradient.apply(weight, g, x.shape, stride, dilation)
        return made
    found, _ = _native(x, weight, g, stride, dilation, which=(True, False))
    assert found is not None
    return found


def _weight_gradient(x: Tensor, g: Tensor, kernel: int, stride: int, dilation: int) -> Tensor:
    if _in_pieces(x, kernel, stride, dilation):
        if dilation == 1:
            return _from_3x3(x, g)
        # Rows and columns of one parity only meet their own: these are four images of half the
        # size, at dilation 1.
        return _weight_gradient(_parities(x), _parities(g), kernel, 1, 1)
    weight = g.new_empty(g.shape[1], 1, kernel, kernel)
    _, found = _native(x, weight, g, stride, dilation, which=(False, True))
    assert found is not None
    return found


def _in_pieces(x: Tensor, kernel: int, stride: int, dilation: int) -> bool:
    """Whether a filter's gradient is taken apart: on a CPU, where that is faster."""
    if x.device.type != "cpu" or stride == 2:
        return False
    return dilation == 2 or (kernel == 5 and x.numel() >= LARGE)


def _native(
    x: Tensor,
    weight: Tensor,
    g: Tensor,
    stride: int,
    dilation: int,
    *,
    which: tuple[bool, bool],
    padding: int | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """PyTorch's own gradients in x and in the weight, one or both.

    For the latter only the weight's shape is read.
    """
    pad = dilation * (weight.shape[-1] // 2) if padding is None else padding
    gx, gw, _ = torch.ops.aten.convolution_backward(
        _fast_format(g),
        _fast_format(x),
        weight,
        None,
        [stride] * 2,
        [pad] * 2,
        [dilation] * 2,
        False,
        [0, 0],
        len(weight),
        [*which, False],
    )
    return gx, gw


def _parities(x: Tensor) -> Tensor:
    """[B, C, H, W] → [4B, C, ⌈H/2⌉, ⌈W/2⌉]: even and odd rows and columns as own images."""
    height, width = x.shape[2:]
    if height % 2 or width % 2:
        x = F.pad(x, (0, width % 2, 0, height % 2))
    columns = torch.unflatten(x.permute(0, 2, 3, 1), 2, (-1, 2))
    split = torch.unflatten(columns, 1, (-1, 2))  # B, H/2, 2, W/2, 2, C
    return split.permute(2, 4, 0, 1, 3, 5).flatten(0, 2).permute(0, 3, 1, 2)


def _from_3x3(x: Tensor, g: Tensor) -> Tensor:
    """The gradient of a 5×5 filter, as four of 3×3 filters that overlap in the middle.

    All four read one copy of `x`, from its beginning or from two pixels later. It has no gaps in
    memory, as oneDNN needs it. Each row of the copy has two zeros in front, and each image two rows
    of them. They serve the row and the image before as well: behind the end of a row stands the
    beginning of the next.
    """
    batch, channels, height, width = x.shape
    size = batch, channels, height + 2, width + 2
    row = size[3] * channels
    strides = size[2] * row, 1, row, channels
    memory = x.new_zeros(batch * strides[0] + 2 * row + 2 * channels)
    memory.as_strided(size, strides)[:, :, 2:, 2:] = x
    found = g.new_empty(channels, 1, 5, 5)
    for top in (0, 2):
        for left in (0, 2):
            shifted = memory.as_strided(size, strides, top * row + left * channels)
            block = found[:, :, top : top + 3, left : left + 3]
            _, gradient = _native(shifted, block, g, 1, 1, which=(False, True), padding=0)
            assert gradient is not None
            block.copy_(gradient)
    return found
