"""What all iterative inverses share: flat vectors, damping, warm starts and the stopping rule."""

from __future__ import annotations

import zlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mlo.hypergradient.options import number
from mlo.hypergradient.products import Engine, LinearSystem, Solve
from mlo.response import Cotangent
from mlo.sharding import sharded_like, whole
from mlo.tensors import zeros_for_none

__all__ = ["FlatOperator", "IterationResult", "IterativeEngine", "fixed_noise"]


class FlatOperator:
    """u ↦ (A + damping · I)ᵀ u on flat vectors, counting products.

    Args:
        system: products on lists of tensors.
        damping: added to the diagonal.
    """

    def __init__(self, system: LinearSystem, damping: float) -> None:
        self._system = system
        self._damping = damping
        self._shapes = [tensor.shape for tensor in system.parameters]
        self._sizes = [tensor.numel() for tensor in system.parameters]
        self.products = 0

    def __call__(self, u: Tensor) -> Tensor:
        self.products += 1
        product = self.flatten(self._system.transpose_product(self.split(u)))
        return product + self._damping * u if self._damping else product

    def flatten(self, parts: Cotangent) -> Tensor:
        """One vector [n] from one tensor per parameter; None counts as zero."""
        return torch.cat(
            [whole(part).reshape(-1) for part in zeros_for_none(parts, self._system.parameters)]
        )

    def split(self, flat: Tensor) -> list[Tensor]:
        """The inverse of `flatten`."""
        # Of a sharded parameter the flat vector has all entries, and each process keeps its part.
        parts: Sequence[Tensor] = torch.split(flat, self._sizes)
        return [
            sharded_like(part.view(shape), parameter)
            for part, shape, parameter in zip(
                parts, self._shapes, self._system.parameters, strict=True
            )
        ]


@dataclass(frozen=True, kw_only=True)
class IterationResult:
    """What an iteration ended with.

    Attributes:
        x: approximate solution of (A + damping · I)ᵀ x = b, flat [n].
        residual: ‖b − (A + damping · I)ᵀ x‖ relative to the cotangent's norm: of the damped system.
        curvature: smallest uᵀAu / uᵀu met, or None.
    """

    x: Tensor
    residual: float
    converged: bool
    advice: str = ""
    curvature: float | None = None


@dataclass(frozen=True, kw_only=True)
class IterativeEngine(Engine):
    """Base of the engines that solve (A + damping · I)ᵀ q = v by products alone.

    Attributes:
        damping: added to the diagonal of A (which contains the optimizer's weight decay already).
        warm_start: start each solve from the solution of the last one on the same problem.
    """

    damping: float = number(0.0)
    warm_start: bool = False

    inverts: ClassVar[bool] = True

    @abstractmethod
    def iterate(
        self, operator: FlatOperator, b: Tensor, scale: float, system: LinearSystem
    ) -> IterationResult:
        """Solves operator(x) ≈ b from x = 0.

        Args:
            operator: the damped product with Aᵀ.
            b: right-hand side, flat [n].
            scale: norm of the cotangent, to which residuals are relative.
            system: the system behind the operator.
        """

    def operator(self, system: LinearSystem) -> FlatOperator:
        """The product that the iteration is made with."""
        return FlatOperator(system, self.damping)

    def solve(self, system: LinearSystem, cotangent: Cotangent) -> Solve:
        operator = self.operator(system)
        v = operator.flatten(cotangent)
        scale = float(v.detach().norm())
        if scale == 0.0:  # q = 0 is exact, and residuals have no scale
            return Solve(q=operator.split(v), report=self.report(system.problem, residual=0.0))
        start = system.recall("q") if self.warm_start else None
        if start is not None and start.shape == v.shape:
            # Aᵀ (q0 + d) = v: the correction d solves the same system, with the residual of the
            # last solution q0 on the right.
            outcome = self.iterate(operator, v - operator(start), scale, system)
            q = start + outcome.x
        else:
            outcome = self.iterate(operator, v, scale, system)
            q = outcome.x
        if self.warm_start:
            system.keep("q", q)
        report = self.report(
            system.problem,
            iterations=operator.products,
            residual=outcome.residual,
            converged=outcome.converged,
            advice=outcome.advice,
            curvature=outcome.curvature,
        )
        return Solve(q=operator.split(q), report=report)


def fixed_noise(operator: FlatOperator, system: LinearSystem, columns: int) -> Tensor:
    """A standard normal matrix [n, columns], the same at every call for a parameter of one name.

    It does not depend on the cotangent, so that solves which use it stay linear in the cotangent.
    Nor does it depend on the order in which parameters are registered.
    """
    # Drawn on the CPU from a hash of the name, so that all devices and processes have the same.
    flat = []
    for column in range(columns):
        parts = []
        for name, tensor in zip(system.names, system.parameters, strict=True):
            generator = torch.Generator().manual_seed(zlib.crc32(f"{name}/{column}".encode()))
            parts.append(
                torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype).to(tensor.device)
            )
        flat.append(operator.flatten(parts))
    return torch.stack(flat, dim=1)
