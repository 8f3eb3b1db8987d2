"""Cross entropy of each row as one autograd function, differentiable any number of times.

Both modes of autograd, forward and backward, are supported.

Three functions, each the derivative of the one before: `_Forward` (CE), `_Gradient` (g (p − t)) and
`_Second` (h (p − t) + g p ∘ (v − ⟨p, v⟩), and ⟨v, p − t⟩), which also serves their forward modes.
From the third derivative on the plain composition takes over. Each has two formulations: Triton
kernels for CUDA, and PyTorch on the softmax p that the first one leaves.
"""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from lfmcw_app.errors import InputError
from lfmcw_app.ops import _eager

__all__ = ["row_cross_entropy"]

ANALYTIC_FROM = 150_000
"""Elements from which on the analytic formulas are faster on a CPU (docs/benchmarks.md)."""


def row_cross_entropy(x: Tensor, y: Tensor, smoothing: float = 0.0) -> Tensor:
    """Cross entropy of each row.

    Args:
        x: logits [B, C].
        y: labels [B], int64.
        smoothing: label smoothing s; the target is (1 − s) onehot(y) + s / C.

    Returns:
        [B], in float32, or float64 for float64 logits. On CUDA a label outside [0, C) makes its
        entry NaN, with all derivatives in its row.

    Raises:
        IndexError: on a CPU for a label outside [0, C).
    """
    # Dynamo silently drops the forward mode of an autograd function.
    kernels = None if torch.compiler.is_compiling() else _formulation(x)
    if x.is_cuda and kernels in (None, _eager):
        # PyTorch's own kernels end the process at such a label, as do gathers and scatters.
        known = (y >= 0) & (y < x.shape[1])
        poison = torch.where(known, 1.0, torch.nan)
        return _by(kernels, x, torch.where(known, y, 0), smoothing) * poison
    return _by(kernels, x, y, smoothing)


def _by(kernels: ModuleType | None, x: Tensor, y: Tensor, smoothing: float) -> Tensor:
    """Cross entropy of each row by a formulation, or by the plain composition."""
    if kernels is None:
        return _eager.composition(x, y, smoothing)
    ce: Tensor = _Forward.apply(x, y, smoothing, kernels)[0]
    return ce


def _is_in_old_vmap(x: Tensor) -> bool:
    """Whether the vmap of `is_grads_batched=True` runs, which needs PyTorch's own operations.

    It does not know `Function.vmap`. A version that lacks this private name has no such vmap.
    """
    told = getattr(torch._C._functorch, "is_legacy_batchedtensor", None)
    return told is not None and bool(told(x))


def _formulation(x: Tensor) -> ModuleType | None:
    """The module with the formulas for these logits; None for the plain composition."""
    forced = os.environ.get("LFMCW_OPS", "")
    if forced not in ("", "eager", "triton"):
        raise InputError(f"LFMCW_OPS must be eager or triton, got {forced!r}.")
    if _is_in_old_vmap(x):
        return None
    if forced == "triton":
        return _triton(x)
    if not forced and x.is_cuda and _can_launch(x.device):
        return _triton(x)
    return _eager if x.numel() >= ANALYTIC_FROM else None


@cache
def _can_launch(device: torch.device) -> bool:
    """Whether Triton is installed and can start a kernel on the device, which is tried once.

    Triton compiles a launcher when it starts a kernel first. That takes a C compiler and the
    headers of Python, which many machines with a GPU lack, and the driver's library in a place
    where Triton looks.
    """
    if importlib.util.find_spec("triton") is None:
        return False
    x, y = torch.zeros(1, 2, device=device), torch.zeros(1, dtype=torch.long, device=device)
    try:
        _triton(x).forward(x, y, 0.0)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        warnings.warn(
            f"Triton cannot start a kernel on {device} ({type(error).__name__}: {error}). The "
            "class-weighted losses use PyTorch's own operations instead, with the same results "
            "and more launches. Most often a C compiler or the headers of Python are missing. "
            "LFMCW_OPS=eager skips Triton without this warning.",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def _triton(x: Tensor) -> ModuleType:
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise InputError(
            "LFMCW_OPS=triton needs logits on a CUDA device (or TRITON_INTERPRET=1, set before the "
            "start)."
        )
    from lfmcw_app.ops import _triton as kernels

    return kernels


class _Forward(torch.autograd.Function):
    """(x, y) ↦ CE [B].

    With it come p or the statistics that the derivatives start from, which have no derivative of
    their own.
    """

    @staticmethod
    def forward(
        x: Tensor, y: Tensor, smoothing: float, kernels: ModuleType
    ) -> tuple[Tensor, Tensor]:
        ce, aux = kernels.forward(x, y, smoothing)
        return ce, aux

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, y, ctx.smoothing, ctx.kernels = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, y, output[1])
        ctx.save_for_forward(x, y, output[1])

    @staticmethod
    def backward(
        ctx: Any, g: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, None, None, None]:
        if g is None:
            return None, None, None, None
        x, y, aux = ctx.saved_tensors
        if _is_in_old_vmap(g):
            return _off(x, y, ctx.smoothing) * g.unsqueeze(1), None, None, None
        return _Gradient.apply(x, aux, y, g, ctx.smoothing, ctx.kernels), None, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, *_: Any) -> tuple[Tensor, None]:
        x, y, aux = ctx.saved_tensors
        dx = torch.zeros_like(x) if dx is None else dx
        # The derivative along dx is ⟨dx, p − t⟩, the second result of `_Second` for g = 0.
        zero = aux.new_zeros(len(x))
        return _Second.apply(x, aux, y, zero, dx, None, ctx.smoothing, ctx.kernels)[1], None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, tuple[int, int]]:
        return _batched(_Forward, info.batch_size, in_dims, inputs), (0, 0)


class _Gradient(torch.autograd.Function):
    """(x, g) ↦ g_b (p − t) [B, C]."""

    @staticmethod
    def forward(
        x: Tensor, aux: Tensor, y: Tensor, g: Tensor, smoothing: float, kernels: ModuleType
    ) -> Tensor:
        found: Tensor = kernels.gradient(x, aux, y, _materialized(g), smoothing)
        return found

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, aux, y, g, ctx.smoothing, ctx.kernels = inputs
        ctx.save_for_backward(x, aux, y, g)
        ctx.save_for_forward(x, aux, y, g)

    @staticmethod
    def backward(
        ctx: Any, v: Tensor
    ) -> tuple[Tensor | None, None, None, Tensor | None, None, None]:
        x, aux, y, g = ctx.saved_tensors
        if _is_in_old_vmap(v):
            found, along = _plain_second(x, y, g, v, None, ctx.smoothing)
            return found, None, None, along, None, None
        in_x, in_g = _Second.apply(x, aux, y, g, v, None, ctx.smoothing, ctx.kernels)
        return in_x, None, None, in_g, None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, _: Any, __: Any, dg: Tensor | None, *___: Any) -> Tensor:
        x, aux, y, g = ctx.saved_tensors
        dx = torch.zeros_like(x) if dx is None else dx
        found: Tensor = _Second.apply(x, aux, y, g, dx, dg, ctx.smoothing, ctx.kernels)[0]
        return found

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, int]:
        return _batched(_Gradient, info.batch_size, in_dims, inputs), 0


class _Second(torch.autograd.Function):
    """(x, g, v, h) ↦ (h_b (p − t) + g_b p ∘ (v − ⟨p, v⟩) [B, C], ⟨v, p − t⟩ [B])."""

    @staticmethod
    def forward(
        x: Tensor,
        aux: Tensor,
        y: Tensor,
        g: Tensor,
        v: Tensor,
        h: Tensor | None,
        smoothing: float,
        kernels: ModuleType,
    ) -> tuple[Tensor, Tensor]:
        h = None if h is None else _materialized(h)
        found, along = kernels.second(x, aux, y, _materialized(g), _materialized(v), h, smoothing)
        return found, along

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, _, y, g, v, h, ctx.smoothing, _ = inputs
        ctx.has_h = h is not None
        ctx.save_for_backward(x, y, g, v, *([h] if ctx.has_h else []))
        ctx.save_for_forward(x, y, g, v, *([h] if ctx.has_h else []))

    @staticmethod
    def backward(ctx: Any, found_bar: Tensor, along_bar: Tensor) -> tuple[Tensor | None, ...]:
        # The third derivative: autograd differentiates the plain composition.
        function, arguments = _of_plain_second(ctx)
        pullback = torch.func.vjp(function, *arguments)[1]
        found: tuple[Tensor, ...] = pullback((found_bar, along_bar))
        in_x, in_g, in_v, *in_h = found
        return in_x, None, None, in_g, in_v, in_h[0] if in_h else None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor, Tensor]:
        function, arguments = _of_plain_second(ctx)
        given = [tangents[0], tangents[3], tangents[4], *([tangents[5]] if ctx.has_h else [])]
        moved = tuple(
            torch.zeros_like(a) if t is None else t for a, t in zip(arguments, given, strict=True)
        )
        found: tuple[Tensor, Tensor] = torch.func.jvp(function, arguments, moved)[1]
        return found

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *inputs: Any) -> tuple[Any, tuple[int, int]]:
        return _batched(_Second, info.batch_size, in_dims, inputs), (0, 0)


def _materialized(tensor: Tensor) -> Tensor:
    """Forward mode's zeros have no memory, which kernels and operations in place need."""
    return tensor.clone() if tensor._is_zerotensor() else tensor


def _of_plain_second(ctx: Any) -> tuple[Callable[..., tuple[Tensor, Tensor]], tuple[Tensor, ...]]:
    """`_plain_second` as a function of (x, g, v, h), and where it was evaluated."""
    x, y, g, v, *h = ctx.saved_tensors

    def function(x: Tensor, g: Tensor, v: Tensor, h: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return _plain_second(x, y, g, v, h, ctx.smoothing)

    return function, (x, g, v, *h)


def _plain_second(
    x: Tensor, y: Tensor, g: Tensor, v: Tensor, h: Tensor | None, smoothing: float
) -> tuple[Tensor, Tensor]:
    """What `_Second` computes, made of PyTorch's operations."""
    p = torch.softmax(_eager.accumulating(x), dim=1)
    v = v.to(p.dtype)
    found = g.unsqueeze(1) * p * (v - (p * v).sum(1, keepdim=True))
    off = _off(x, y, smoothing)
    if h is not None:
        found = found + h.unsqueeze(1) * off
    return found.to(x.dtype), (v * off).sum(1)


def _off(x: Tensor, y: Tensor, smoothing: float) -> Tensor:
    """The difference p − t, made of PyTorch's operations."""
    p = torch.softmax(_eager.accumulating(x), dim=1)
    onehot = torch.zeros_like(p).scatter(1, y.unsqueeze(1), 1.0)
    return p - (1.0 - smoothing) * onehot - smoothing / p.shape[1]


def _batched(function: Any, size: int, in_dims: tuple[Any, ...], inputs: tuple[Any, ...]) -> Any:
    """Applies a row-wise function to `size` batches at once, as one longer list of rows."""
    # A tensor without a batch dimension is the same in all batches.
    flat = []
    for value, dim in zip(inputs, in_dims, strict=True):
        if isinstance(value, Tensor):
            value = value.movedim(dim, 0) if dim is not None else value.expand(size, *value.shape)
            value = value.reshape(-1, *value.shape[2:])
        flat.append(value)
    found = function.apply(*flat)
    if isinstance(found, tuple):
        return tuple(part.reshape(size, -1, *part.shape[1:]) for part in found)
    return found.reshape(size, -1, *found.shape[1:])
