"""`nystrom`: a low-rank approximation of A, inverted itself or preconditioning `cg`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mlo.errors import EngineError
from mlo.hypergradient.cg import conjugate_gradients
from mlo.hypergradient.iterative import (
    ADVICE_NOT_FINITE,
    FlatOperator,
    IterationResult,
    IterativeEngine,
    fixed_noise,
)
from mlo.hypergradient.options import count, number
from mlo.hypergradient.products import LinearSystem
from mlo.tensors import norm_of

__all__ = ["Nystrom"]

MISSED = 0.5
"""A residual above which the approximation alone has failed."""


@dataclass(frozen=True, kw_only=True)
class Nystrom(IterativeEngine):
    """Conjugate gradients preconditioned by a randomized low-rank approximation of A.

    It solves (A + damping · I) q = v for a symmetric positive semidefinite A, whose approximation
    of rank r is U Λ Uᵀ. With `max_steps` 0 the approximation alone is inverted,

        q = (UΛUᵀ + ridge · I)⁻¹ v,

    which is right only in the span of U. The residual shows how wrong it is elsewhere.

    Attributes:
        rank: r; at most the number of parameters is used. The approximation takes r products.
        ridge: added to the approximation before it is inverted.
        max_steps: steps of preconditioned conjugate gradients after it.
        tol: relative residual at which these stop. Without steps it is the residual up to which the
            solve has converged; it has failed if half of the cotangent is left over.

    Reference: Hataya and Yamada, Nyström Method for Accurate and Scalable Implicit Differentiation
    (2023); Frangella, Tropp and Udell, Randomized Nyström Preconditioning (2023), Algorithm 2.1.
    """

    rank: int = count(10)
    ridge: float = number(1e-3, positive=True)
    max_steps: int = count(20, at_least=0)
    tol: float = number(1e-6)

    name: ClassVar[str] = "nystrom"
    needs_symmetry: ClassVar[bool] = True

    def iterate(
        self, operator: FlatOperator, b: Tensor, scale: float, system: LinearSystem
    ) -> IterationResult:
        approximation = self._approximation(operator, system)
        if approximation is None:
            return IterationResult(
                x=torch.zeros_like(b),
                residual=norm_of(b) / scale,
                converged=False,
                advice=ADVICE_NOT_FINITE,
            )
        basis, eigenvalues = approximation

        def precondition(u: Tensor) -> Tensor:
            # (λ_r + ridge) U (Λ + ridge I)⁻¹ Uᵀ u + (I − U Uᵀ) u: up to the factor λ_r + ridge the
            # inverse of the approximation, with its smallest eigenvalue λ_r outside of U's span.
            inside = basis.T @ u
            smallest = eigenvalues[-1] + self.ridge
            return basis @ (inside * smallest / (eigenvalues + self.ridge)) + (u - basis @ inside)

        if self.max_steps == 0:
            # (UΛUᵀ + ridge I)⁻¹ b = U (Λ + ridge I)⁻¹ Uᵀ b + (b − U Uᵀ b) / ridge.
            inside = basis.T @ b
            x = basis @ (inside / (eigenvalues + self.ridge)) + (b - basis @ inside) / self.ridge
            residual = norm_of(b - operator(x)) / scale
            advice = (
                "The approximation misses much of the Jacobian: raise rank, or let max_steps "
                "refine it."
            )
            return IterationResult(
                x=x,
                residual=residual,
                converged=residual <= self.tol,
                advice="" if residual <= MISSED else advice,
            )
        return conjugate_gradients(
            operator,
            b,
            scale,
            max_steps=self.max_steps,
            tol=self.tol,
            others=system.advice,
            damping=self.damping,
            precondition=precondition,
            more="max_steps or rank",
        )

    def _approximation(
        self, operator: FlatOperator, system: LinearSystem
    ) -> tuple[Tensor, Tensor] | None:
        """U [n, r] with orthonormal columns and Λ [r] ≥ 0, largest first; None: not finite."""
        # With orthonormal columns Ω, Nyström's approximation is (AΩ) (ΩᵀAΩ)⁻¹ (AΩ)ᵀ.
        rank = min(self.rank, sum(tensor.numel() for tensor in system.parameters))
        sketch, _ = torch.linalg.qr(fixed_noise(operator, system, rank))
        image = torch.stack([operator(column) for column in sketch.T], dim=1)

        # Of A + shift I instead, which keeps the Cholesky factorization stable. The shift is
        # subtracted from the eigenvalues again.
        size = norm_of(image)
        if not math.isfinite(size):
            return None
        shift = math.sqrt(len(sketch)) * torch.finfo(sketch.dtype).eps * size
        shifted = image + shift * sketch
        core = sketch.T @ shifted
        factor, info = torch.linalg.cholesky_ex((core + core.T) / 2)
        if int(info) != 0:
            raise EngineError(
                f"Engine 'nystrom': the Jacobian of problem {system.problem!r} is not positive "
                "semidefinite on its sketch. Add damping"
                f"{system.advice.phrase(', or use {}', 'minres', 'gmres')}."
            )
        # ΩᵀAΩ = L Lᵀ, so the approximation is H Hᵀ with H = (AΩ) L⁻ᵀ: H = U S Vᵀ gives Λ = S².
        half = torch.linalg.solve_triangular(factor, shifted.T, upper=False).T
        basis, singular, _ = torch.linalg.svd(half, full_matrices=False)
        return basis, (singular**2 - shift).clamp(min=0.0)
