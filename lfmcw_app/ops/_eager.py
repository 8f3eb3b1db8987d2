"""Row-wise cross entropy and its derivatives in plain PyTorch.

With p = softmax(x) and targets t = (1 − s) onehot(y) + s / C for a label smoothing s, of each row
of x [B, C]:

    CE         = −⟨t, log p⟩
    dCE/dx     = p − t
    d²CE/dx² v = p ∘ (v − ⟨p, v⟩)

There are two formulations: the composition of PyTorch's own operations, and these formulas on p.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["composition", "forward", "gradient", "second"]


NO_LABEL = torch.iinfo(torch.int64).min
"""Replaces PyTorch's -100, which it would skip silently."""


def accumulating(x: Tensor) -> Tensor:
    """The logits in the dtype of all sums: at least float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def composition(x: Tensor, y: Tensor, smoothing: float) -> Tensor:
    """CE of each row [B], by PyTorch's own differentiable operations."""
    return F.cross_entropy(
        accumulating(x), y, reduction="none", label_smoothing=smoothing, ignore_index=NO_LABEL
    )


def forward(x: Tensor, y: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """CE of each row [B], and p [B, C]."""
    x = accumulating(x)
    largest = x.amax(dim=1, keepdim=True)
    p = (x - largest).exp_()
    total = p.sum(dim=1, keepdim=True)
    p.div_(total)

    # −⟨t, log p⟩ with log p = (x − max) − log Σ: the two parts are never added up, which would lose
    # the digits of large logits.
    off = largest + F.nll_loss(x, y, reduction="none", ignore_index=NO_LABEL).unsqueeze(1)
    if smoothing:
        off = (1.0 - smoothing) * off + smoothing * (largest - x).mean(dim=1, keepdim=True)
    return (off + total.log()).squeeze(1), p


def gradient(x: Tensor, p: Tensor, y: Tensor, g: Tensor, smoothing: float) -> Tensor:
    """g_b (p − t) for each row [B, C], in the dtype of x."""
    g = g.unsqueeze(1)
    found = p * g
    _subtract_targets(found, y, g, smoothing)
    return found.to(x.dtype)


def second(
    x: Tensor, p: Tensor, y: Tensor, g: Tensor, v: Tensor, h: Tensor | None, smoothing: float
) -> tuple[Tensor, Tensor]:
    """(h_b (p − t) + g_b p ∘ (v − ⟨p, v⟩) [B, C] in the dtype of x, ⟨v, p − t⟩ [B]).

    Where h is None it counts as zero.
    """
    v = v.to(p.dtype)
    # vecdot is a matmul, which autocast would compute in bfloat16.
    with torch.autocast(x.device.type, enabled=False):
        mean = torch.linalg.vecdot(p, v)

    # ⟨v, p − t⟩, then both terms of the first result with one product by p.
    along = mean - (1.0 - smoothing) * v.gather(1, y.unsqueeze(1)).squeeze(1)
    if smoothing:
        along = along - smoothing * v.mean(dim=1)
    scale = -mean * g if h is None else h - mean * g
    found = torch.addcmul(scale.unsqueeze(1), v, g.unsqueeze(1)).mul_(p)
    if h is not None:
        _subtract_targets(found, y, h.unsqueeze(1), smoothing)
    return found.to(x.dtype), along


def _subtract_targets(found: Tensor, y: Tensor, scale: Tensor, smoothing: float) -> None:
    """Subtracts scale · t in place; scale [B, 1]."""
    found.scatter_add_(1, y.unsqueeze(1), (smoothing - 1.0) * scale)
    if smoothing:
        found.sub_(scale * (smoothing / found.shape[1]))
