"""A fit of four numbers w with a penalty that is weighted by exp(x), and what judges the fit."""

from __future__ import annotations

import torch

A, B, C = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def lower(w, x, penalty):
    return (A * w**2).sum() - (B * w).sum() + (w**4).sum() + x.exp() * penalty


def upper(w, x):
    return ((w - C) ** 2).sum() + x**2
