"""`neumann`: the inverse by its truncated Neumann series, A⁻ᵀ v ≈ α Σ_{k < K} (I − α Aᵀ)ᵏ v."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mlo.hypergradient.iterative import FlatOperator, IterationResult, IterativeEngine
from mlo.hypergradient.options import count, number, number_or_auto
from mlo.hypergradient.products import LinearSystem
from mlo.hypergradient.step_size import largest_inverse_step_size

__all__ = ["Neumann"]

GROWTH = 10.0
"""A term this many times larger than the first one means that the series diverges."""

HALVINGS = 3
"""How often "auto" halves a step size at which the series diverged."""


@dataclass(frozen=True, kw_only=True)
class Neumann(IterativeEngine):
    """K terms of the Neumann series, by K − 1 products with Aᵀ.

    It also serves games whose Jacobian has eigenvalues with positive real parts.

    Attributes:
        num_terms: K.
        tol: residual above which the sum counts as not converged. At the default half of the
            cotangent is left over.
        step_size: α, which must be below 2 / λmax for the series to converge. "auto" takes
            1 / λmax, estimated by ten products of power iteration (for a game Re λ / |λ|² of the
            largest eigenvalue), and halves it where the series diverges still.

    Reference: Lorraine et al., Optimizing Millions of Hyperparameters by Implicit Differentiation
    (2020), Theorem 3.
    """

    num_terms: int = count(10)
    step_size: float | str = number_or_auto()
    tol: float = number(0.5)

    name: ClassVar[str] = "neumann"
    is_polynomial: ClassVar[bool] = True

    def iterate(
        self, operator: FlatOperator, b: Tensor, scale: float, system: LinearSystem
    ) -> IterationResult:
        if not isinstance(self.step_size, str):
            return self._sum(operator, b, scale, float(self.step_size))
        largest = largest_inverse_step_size(operator, system)
        alpha = 1.0 / largest if largest > 0.0 else 1.0
        # Power iteration approaches λmax from below, so its 1 / λmax may be too long a step.
        for attempt in range(HALVINGS + 1):
            outcome = self._sum(operator, b, scale, alpha / 2**attempt)
            if outcome.residual <= GROWTH * float(b.detach().norm()) / scale:
                break
        return outcome

    def _sum(
        self, operator: FlatOperator, b: Tensor, scale: float, alpha: float
    ) -> IterationResult:
        """The sum with one α."""
        # term = (I − αAᵀ)ᵏ b and total = Σ_{j ≤ k} (I − αAᵀ)ʲ b; x = α total.
        term = total = b
        first, size = float(b.detach().norm()), float(b.detach().norm())
        for _ in range(self.num_terms - 1):
            term = term - alpha * operator(term)
            size = float(term.detach().norm())
            if not math.isfinite(size) or size > GROWTH * first:
                return IterationResult(
                    x=alpha * total,
                    residual=size / scale,
                    converged=False,
                    advice=f"The series diverges at step_size {alpha:.3g}: use step_size='auto', "
                    "or one below 2 / λmax; "
                    "on a Jacobian with negative eigenvalues, damping, 'minres' or 'gmres'.",
                )
            total = total + term
        # The residual of the sum is the term after the last: v − Aᵀ α Σ = (I − αAᵀ)ᴷ v. While the
        # terms shrink, the last one, which is at hand, bounds it.
        residual = size / scale
        converged = residual <= self.tol or self.num_terms == 1
        advice = (
            ""
            if converged
            else "The series has hardly begun to converge: raise num_terms, or use 'cg'."
        )
        return IterationResult(
            x=alpha * total, residual=residual, converged=converged, advice=advice
        )
