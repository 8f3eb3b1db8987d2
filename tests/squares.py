"""x² with a backward pass of its own, once and twice differentiable."""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable


class Square(torch.autograd.Function):
    """x², whose backward pass can be differentiated."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2.0 * x * gradient


class SquareOnce(Square):
    """x², whose backward pass cannot be differentiated."""

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2.0 * x * gradient
