"""`nystrom`: the inverse of a low-rank approximation of A, alone or as the preconditioner of conjugate gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mlo.errors import EngineError
from mlo.hypergradient.iterative import FlatOperator, IterativeEngine, Outcome, at_least_one
from mlo.hypergradient.products import LinearSystem

__all__ = ["Nystrom"]


@dataclass(frozen=True, kw_only=True)
class Nystrom(IterativeEngine):
    """(A + damping · I)⁻¹ by a randomized rank-r approximation of a symmetric positive semidefinite A.

    A ≈ U Λ Uᵀ from r products with a fixed Gaussian sketch. With `max_steps` 0, q = (U Λ Uᵀ + damping · I)⁻¹ v; otherwise
    that inverse preconditions as many steps of conjugate gradients on A itself.

    Attributes:
        rank: r; at most the number of parameters is used.
        max_steps: steps of preconditioned conjugate gradients after it.
        tol: relative residual at which these stop.
        damping: must be positive: outside the span of U it is all that there is to invert.

    Reference: Hataya and Yamada, Nyström Method for Accurate and Scalable Implicit Differentiation (2023); Frangella,
    Tropp and Udell, Randomized Nyström Preconditioning (2023), Algorithm 2.1.
    """

    rank: int = 10
    max_steps: int = 10
    tol: float = 1e-6
    damping: float = 1e-3

    name: ClassVar[str] = "nystrom"

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self.name, "rank", self.rank)
        if not self.damping > 0.0:
            raise EngineError(f"Engine 'nystrom': damping must be positive, got {self.damping!r}.")
        if isinstance(self.max_steps, bool) or not isinstance(self.max_steps, int) or self.max_steps < 0:
            raise EngineError(f"Engine 'nystrom': max_steps must be an integer of at least 0, got {self.max_steps!r}.")

    def iterate(self, operator: FlatOperator, b: Tensor, scale: float, system: LinearSystem) -> Outcome:
        basis, eigenvalues, least = self._approximation(operator, b)

        def inverse(u: Tensor) -> Tensor:
            inside = basis.T @ u
            return basis @ (inside / (eigenvalues + self.damping)) + (u - basis @ inside) / self.damping

        def precondition(u: Tensor) -> Tensor:
            # The same up to scale: eigenvalues outside the basis are taken as the smallest one inside.
            inside = basis.T @ u
            smallest = eigenvalues[-1] + self.damping
            return basis @ (inside * smallest / (eigenvalues + self.damping)) + (u - basis @ inside)

        if self.max_steps == 0:
            x = inverse(b)
            return Outcome(x=x, residual=None, converged=bool(torch.isfinite(x.detach()).all()), curvature=least)
        x, r = torch.zeros_like(b), b
        z = p = precondition(r)
        rz = r @ z
        for _ in range(self.max_steps):
            if float(r.detach().norm()) <= self.tol * scale:
                break
            product = operator(p)
            curvature = p @ product
            if not float(curvature.detach()) > 0.0:
                return Outcome(
                    x=x,
                    residual=float(r.detach().norm()) / scale,
                    converged=False,
                    advice="The Jacobian is not positive definite: raise damping, or use 'minres'.",
                    curvature=float((curvature / (p @ p)).detach()),
                )
            step = rz / curvature
            x, r = x + step * p, r - step * product
            z = precondition(r)
            previous, rz = rz, r @ z
            p = z + (rz / previous) * p
        residual = float(r.detach().norm()) / scale
        converged = residual <= self.tol
        advice = "" if converged else "Raise max_steps or rank, or accept the truncation by a larger tol."
        return Outcome(x=x, residual=residual, converged=converged, advice=advice, curvature=least)

    def _approximation(self, operator: FlatOperator, b: Tensor) -> tuple[Tensor, Tensor, float | None]:
        """U [n, r] with orthonormal columns and Λ [r] ≥ 0, largest first, of A (without damping)."""
        rank = min(self.rank, b.numel())
        generator = torch.Generator().manual_seed(0)
        sketch = torch.randn(b.numel(), rank, generator=generator, dtype=b.dtype).to(b.device)
        sketch, _ = torch.linalg.qr(sketch)
        image = torch.stack([operator(column) for column in sketch.T], dim=1) - self.damping * sketch
        # The shift keeps the Cholesky factorization stable and is subtracted from the eigenvalues again.
        shift = math.sqrt(b.numel()) * torch.finfo(b.dtype).eps * float(image.detach().norm())
        shifted = image + shift * sketch
        core = sketch.T @ shifted
        factor, info = torch.linalg.cholesky_ex((core + core.T) / 2)
        if int(info) != 0:
            raise EngineError(
                "Engine 'nystrom': the Jacobian is not positive semidefinite on its sketch. Use 'minres' "
                "(symmetric, indefinite) or 'gmres' (games)."
            )
        half = torch.linalg.solve_triangular(factor, shifted.T, upper=False).T
        basis, singular, _ = torch.linalg.svd(half, full_matrices=False)
        return basis, (singular**2 - shift).clamp(min=0.0), None
