"""The architecture's gradient by the paths of the method (Gala and Xie, Eqs. 12-18)."""

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
    """Returns each path's part of the architecture's gradient: norm, cosine with the total.

    Changes nothing; costs one gradient per path.
    """
    # The gradient is linear in what flows through the solutions of the lower problems. So a part is
    # the difference between two gradients, of which the second holds one solution fewer constant.
    lower = [name for name in optimizer.problems if name != "arch"]
    constant = [lower, [name for name in lower if name != "w2"]]
    paths = list(PATHS[:2])
    if "gan" in lower:
        constant.append(["gan"])
        paths.append("w1_w2")
    if "w1" in lower:
        constant.append([])
        paths.append("gan_w2" if "gan" in lower else "w1_w2")
    sums = [_flat(optimizer.gradient("arch", held_constant=names)) for names in constant]
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
