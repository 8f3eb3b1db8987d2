"""`cg`: conjugate gradients, for symmetric positive definite A; negative curvature stops it and is reported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mlo.hypergradient.iterative import FlatOperator, IterativeEngine, Outcome, at_least_one
from mlo.hypergradient.products import LinearSystem

__all__ = ["ConjugateGradient"]


@dataclass(frozen=True, kw_only=True)
class ConjugateGradient(IterativeEngine):
    """Conjugate gradients on (A + damping · I) q = v.

    At a direction of curvature that is not positive the iteration stops with what it has: A is not positive definite
    there, and a step along it would lead away from every solution.

    Attributes:
        max_steps: most products with A.
        tol: relative residual at which it stops.

    Reference: Hestenes and Stiefel (1952); for hypergradients Pedregosa, HOAG (2016), Rajeswaran et al., iMAML (2019).
    """

    max_steps: int = 20
    tol: float = 1e-6

    name: ClassVar[str] = "cg"
    needs_symmetry: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self.name, "max_steps", self.max_steps)

    def iterate(self, operator: FlatOperator, b: Tensor, scale: float, system: LinearSystem) -> Outcome:
        x = torch.zeros_like(b)
        r = p = b
        rr = r @ r
        smallest: float | None = None
        for _ in range(self.max_steps):
            if float(rr.detach().sqrt()) <= self.tol * scale:
                break
            product = operator(p)
            curvature = p @ product
            met = float((curvature / (p @ p)).detach())
            smallest = met if smallest is None else min(smallest, met)
            if not met > 0.0:
                return Outcome(
                    x=x,
                    residual=float(rr.detach().sqrt()) / scale,
                    converged=False,
                    advice=f"The curvature is {met:.3g} along a direction, so the Jacobian is not positive definite: add "
                    f"damping above {-met:.3g}, or use 'minres' (symmetric) or 'gmres' (games).",
                    curvature=smallest,
                )
            step = rr / curvature
            x = x + step * p
            r = r - step * product
            previous, rr = rr, r @ r
            p = r + (rr / previous) * p
        residual = float(rr.detach().sqrt()) / scale
        converged = residual <= self.tol
        advice = "" if converged else "Raise max_steps, add damping, or accept the truncation by a larger tol."
        return Outcome(x=x, residual=residual, converged=converged, advice=advice, curvature=smallest)
