"""`direct`: builds the Jacobian A of the stationarity map and solves Aᵀ q = v densely. For tests and small problems."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mlo.errors import EngineError
from mlo.hypergradient.base import Cotangent, Engine, Solve, relative_residual
from mlo.hypergradient.iterative import at_least_one, check_number
from mlo.hypergradient.products import LinearSystem

__all__ = ["Direct"]


@dataclass(frozen=True, kw_only=True)
class Direct(Engine):
    """The exact implicit derivative at a stationary point, by a dense solve with n products for n parameters.

    Attributes:
        damping: added to the diagonal of A.
        max_parameters: refuses larger problems, whose dense Jacobian would not be meant.
        tol: relative residual above which the solve counts as not converged.
    """

    damping: float = 0.0
    max_parameters: int = 5000
    tol: float = 1e-4

    name: ClassVar[str] = "direct"
    inverts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self.name, "max_parameters", self.max_parameters)
        check_number(self.name, "damping", self.damping)
        check_number(self.name, "tol", self.tol)

    def solve(self, system: LinearSystem, cotangent: Cotangent) -> Solve:
        theta = list(system.parameters)
        sizes = [tensor.numel() for tensor in theta]
        count = sum(sizes)
        if count > self.max_parameters:
            raise EngineError(
                f"Engine 'direct' builds a dense Jacobian, and problem {system.problem!r} has {count:,} parameters (more "
                f"than max_parameters={self.max_parameters:,}). Use an iterative engine, or raise max_parameters."
            )
        v = [torch.zeros_like(t) if c is None else c for t, c in zip(theta, cotangent, strict=True)]

        def split(flat: Tensor) -> list[Tensor]:
            return [part.view_as(t) for part, t in zip(torch.split(flat, sizes), theta, strict=True)]

        def flatten(parts: list[Tensor]) -> Tensor:
            return torch.cat([part.reshape(-1) for part in parts])

        identity = torch.eye(count, dtype=theta[0].dtype, device=theta[0].device)
        # Row i of the matrix is Aᵀ e_i, which is row i of A.
        jacobian = torch.stack([flatten(system.transpose_product(split(row))) for row in identity])
        matrix = (jacobian + self.damping * identity).T
        solved, info = torch.linalg.solve_ex(matrix, flatten(v))
        if int(info) != 0:
            raise EngineError(
                f"Engine 'direct': the Jacobian of problem {system.problem!r} is singular, so its solution is not a "
                "function of what it reads. Add weight decay to the problem, or damping to the engine."
            )
        q = split(solved)
        residual = relative_residual(system, [a.detach() for a in q], v) if not self.damping else None
        converged = residual is None or residual <= self.tol
        advice = "" if converged else "The Jacobian is ill-conditioned: add damping, or compute in float64."
        return Solve(
            q=q,
            report=self.report(system.problem, iterations=count, residual=residual, converged=converged, advice=advice),
        )
