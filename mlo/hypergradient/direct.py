"""`direct`: builds the Jacobian A and solves Aᵀ q = v densely, for tests and small problems."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch

from mlo.errors import EngineError
from mlo.hypergradient.iterative import ADVICE_NOT_FINITE, FlatOperator
from mlo.hypergradient.options import count, number
from mlo.hypergradient.products import Engine, LinearSystem, Solve
from mlo.response import Cotangent
from mlo.tensors import norm_of, zeros_for_none

__all__ = ["Direct"]


@dataclass(frozen=True, kw_only=True)
class Direct(Engine):
    """The exact implicit derivative at a stationary point, by n products and a dense solve.

    n is the number of parameters.

    Attributes:
        damping: added to the diagonal of A.
        max_parameters: refuses larger problems, whose dense Jacobian is surely a mistake.
        tol: relative residual above which the solve has not converged, but failed. In exact
            arithmetic it is zero, so it shows rounding.
    """

    damping: float = number(0.0)
    max_parameters: int = count(5000)
    tol: float = number(1e-4)

    name: ClassVar[str] = "direct"
    inverts: ClassVar[bool] = True

    def solve(self, system: LinearSystem, cotangent: Cotangent) -> Solve:
        # n² numbers in memory and n products: only if that is intended.
        theta = system.parameters
        size = sum(tensor.numel() for tensor in theta)
        if size > self.max_parameters:
            raise EngineError(
                f"Engine 'direct' builds a dense Jacobian, and problem {system.problem!r} has "
                f"{size:,} parameters (more than max_parameters={self.max_parameters:,}). Use an "
                "iterative engine, or raise max_parameters."
            )
        v = zeros_for_none(cotangent, theta)
        if size == 0:
            return Solve(q=v, report=self.report(system.problem, residual=0.0))
        operator = FlatOperator(system, self.damping)
        identity = torch.eye(size, dtype=theta[0].dtype, device=theta[0].device)
        # Aᵀ e_i is row i of A.
        jacobian = torch.stack([operator(row) for row in identity])
        solved, info = torch.linalg.solve_ex(jacobian.T, operator.flatten(v))
        if int(info) != 0:
            raise EngineError(
                f"Engine 'direct': the Jacobian of problem {system.problem!r} is singular, so its "
                "solution is not a function of what it reads. Add weight decay to the problem, or "
                "damping to the engine."
            )
        q = operator.split(solved)
        # One more product shows how much of the answer is rounding.
        with torch.no_grad():
            b = operator.flatten(v)
            residual = norm_of(operator(solved) - b) / (norm_of(b) or 1.0)
        converged = residual <= self.tol
        advice = ""
        if math.isnan(residual):
            advice = ADVICE_NOT_FINITE
        elif not converged:
            advice = "The Jacobian is ill-conditioned: add damping, or compute in float64."
        return Solve(
            q=q,
            report=self.report(
                system.problem,
                iterations=size,
                residual=residual,
                converged=converged,
                advice=advice,
            ),
        )
