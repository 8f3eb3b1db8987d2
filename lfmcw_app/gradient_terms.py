"""The architecture's gradient taken apart by the paths of the method: what each contributes (Gala
and Xie, Eqs. 12-18).
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from mlo import MultilevelOptimizer

__all__ = ["PATHS", "gradient_terms"]

PATHS = ("direct", "w2", "w1_w2", "gan_w2")
"""A itself; A → W2; A → W1 → W2; A → G → W2."""


def gradient_terms(optimizer: MultilevelOptimizer) -> dict[str, dict[str, float]]:
    """Returns for each path its part of the architecture's total gradient: norm, and cosine with
    the total.

    The parts are differences of gradients in which fewer and fewer solutions are held fixed, since
    the gradient is linear in what flows through them. Changes nothing; costs a gradient for each
    path.
    """
    lower = [name for name in optimizer.problems if name != "arch"]
    fixed = [lower, [name for name in lower if name != "w2"]]
    paths = list(PATHS[:2])
    if "w1" in lower:
        fixed += [["gan"], []]
        paths += PATHS[2:]
    sums = [_flat(optimizer.gradient("arch", fixed=held)) for held in fixed]
    parts = [sums[0], *(later - earlier for earlier, later in itertools.pairwise(sums))]
    return {path: _described(part, sums[-1]) for path, part in zip(paths, parts, strict=True)}


def _flat(gradient: dict[str, Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in gradient.values()])


def _described(part: Tensor, total: Tensor) -> dict[str, Any]:
    sizes = float(part.norm()) * float(total.norm())
    return {
        "norm": float(part.norm()),
        "cosine": float(part @ total) / sizes if sizes > 0.0 else 0.0,
    }
