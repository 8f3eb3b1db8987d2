"""The norm of a gradient: tensor by tensor at once, and of all together on request."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mlo.sharding import whole
from mlo.tensors import are_alike, numbers, scaled

__all__ = ["GradientNorm", "clip", "clip_by_norm", "norms_of", "total_norm"]

BELOW_OVERFLOW = 1e15
"""Norms of parts below this cannot overflow together, in a dtype with float32's exponents."""

WIDE = (torch.float32, torch.float64, torch.bfloat16)
"""Dtypes with float32's exponents, or more."""


class GradientNorm:
    """The Euclidean norm of tensors together, of sharded ones over all their parts.

    Creating it records the norms of the tensors, so later changes do not matter. They are combined
    when the whole is read.

    Args:
        tensors: of any devices and dtypes.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        found = list(tensors)
        self._parts: Sequence[Tensor] | None = None
        self._total: Tensor | None = None
        if are_alike(found):
            self._parts = torch._foreach_norm(found)
        else:
            with torch.no_grad():
                self._total = whole(torch.nn.utils.get_total_norm(found))

    @property
    def total(self) -> Tensor:
        """The norm, a scalar on the device of the tensors."""
        # As `torch.nn.utils.get_total_norm` does, which groups tensors first; that takes as long.
        if self._total is None:
            assert self._parts is not None
            self._total = torch.linalg.vector_norm(torch.stack(tuple(self._parts)))
        return self._total

    def is_finite(self, losses: Iterable[Tensor]) -> bool:
        """Whether the norm and the losses are all finite.

        On a GPU this takes one reduction and one synchronisation.
        """
        values = list(losses)
        if not self._is_small():
            values.append(self.total)
        for value in values:
            if not value.is_cpu:
                break
            if not math.isfinite(value.item()):
                return False
        else:
            return True
        # 0 · x is 0, or NaN where x is not finite; a sum of finite values could overflow.
        norm = self.total
        zeros = [0.0 * value.detach().to(norm.device) for value in values]
        return math.isfinite(sum(zeros, torch.zeros_like(norm)).item())

    def _is_small(self) -> bool:
        """Whether its parts, which are known, show that it is finite."""
        # On the CPU numbers are read faster than they are combined.
        parts = self._parts
        if parts is None or not parts[0].is_cpu or parts[0].dtype not in WIDE:
            return False
        return all(map(BELOW_OVERFLOW.__gt__, numbers(parts)))  # not of NaN

    def __float__(self) -> float:
        return float(self.total)


def norms_of(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The Euclidean norm of every tensor, as scalars on their devices."""
    if are_alike(tensors):
        return torch._foreach_norm(list(tensors))
    with torch.no_grad():
        return [whole(tensor.norm()) for tensor in tensors]


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The Euclidean norm of all tensors together, of sharded ones over all their parts."""
    return GradientNorm(tensors).total


def clip(gradients: dict[str, Tensor], largest: float) -> dict[str, Tensor]:
    """The gradients, clipped by the norm of all together, differentiable in it too."""
    norms = [torch.linalg.vector_norm(gradient) for gradient in gradients.values()]
    return clip_by_norm(gradients, largest, torch.linalg.vector_norm(torch.stack(norms)))


def clip_by_norm(gradients: dict[str, Tensor], largest: float, norm: Tensor) -> dict[str, Tensor]:
    """The gradients, scaled by one factor if their common norm exceeds the largest.

    Args:
        gradients: name → gradient.
        largest: largest Euclidean norm.
        norm: the norm of all of them.
    """
    # torch.nn.utils.clip_grad_norm_ scales by this, 1e-6 included.
    scale = torch.clamp(largest / (norm + 1e-6), max=1.0)
    return dict(zip(gradients, scaled(list(gradients.values()), scale), strict=True))
