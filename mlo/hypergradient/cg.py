"""`cg`: conjugate gradients, for symmetric positive definite A.

Negative curvature stops the iteration and is reported.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mlo.advice import EngineAdvice
from mlo.hypergradient.iterative import (
    ADVICE_NOT_FINITE,
    FlatOperator,
    IterationResult,
    IterativeEngine,
)
from mlo.hypergradient.options import count, number
from mlo.hypergradient.products import LinearSystem
from mlo.tensors import norm_of

__all__ = ["ConjugateGradient", "conjugate_gradients"]


@dataclass(frozen=True, kw_only=True)
class ConjugateGradient(IterativeEngine):
    """Conjugate gradients on (A + damping · I) q = v.

    If the curvature along a direction is not positive, the iteration stops with its current result.
    A is then not positive definite, and a step along it would lead away from every solution.

    Attributes:
        max_steps: most products with A.
        tol: relative residual at which it stops.

    Reference: Hestenes and Stiefel (1952); for hypergradients Pedregosa, HOAG (2016), and
    Rajeswaran et al., iMAML (2019).
    """

    max_steps: int = count(20)
    tol: float = number(1e-6)

    name: ClassVar[str] = "cg"
    needs_symmetry: ClassVar[bool] = True

    def iterate(
        self, operator: FlatOperator, b: Tensor, scale: float, system: LinearSystem
    ) -> IterationResult:
        return conjugate_gradients(
            operator,
            b,
            scale,
            max_steps=self.max_steps,
            tol=self.tol,
            others=system.advice,
            damping=self.damping,
        )


def conjugate_gradients(
    operator: FlatOperator,
    b: Tensor,
    scale: float,
    *,
    max_steps: int,
    tol: float,
    others: EngineAdvice,
    damping: float = 0.0,
    precondition: Callable[[Tensor], Tensor] | None = None,
    more: str = "max_steps",
) -> IterationResult:
    """Solves operator(x) = b from x = 0 for a symmetric positive definite operator.

    If the curvature along a direction is not positive, it stops with its current result.

    Args:
        operator: the product.
        b: right-hand side, flat [n].
        scale: the norm to which residuals are relative.
        max_steps: most products.
        tol: relative residual at which it stops.
        others: names engines that could serve instead.
        damping: what the operator contains of it already, for the advice.
        precondition: r → M⁻¹ r, with a symmetric positive definite M that resembles the operator.
        more: the option that the advice names if the steps are not enough.
    """
    # Below epsilon² the r of the recursion says nothing, and its squares underflow.
    tol = max(tol, torch.finfo(b.dtype).eps ** 2)
    # r = b − A x is the residual, z = M⁻¹ r the preconditioned one, p the search direction.
    x = torch.zeros_like(b)
    r = b
    z = p = r if precondition is None else precondition(r)
    rz = r @ z
    smallest: float | None = None
    residual = norm_of(r) / scale
    for _ in range(max_steps):
        if residual <= tol:
            break
        product = operator(p)
        curvature = p @ product
        # The Rayleigh quotient along p lies between the smallest and the largest eigenvalue.
        met = float((curvature / (p @ p)).detach())
        advice = "" if math.isfinite(met) else ADVICE_NOT_FINITE
        if not advice:
            smallest = met if smallest is None else min(smallest, met)
        if not advice and met <= 0.0:
            # The smallest eigenvalue is at most what was met.
            what, advised = ("Jacobian", "add damping")
            if damping:
                what = f"Jacobian + {damping:g} · I"
                advised = f"raise damping from {damping:g} to"
            advice = (
                f"The curvature is {met:.3g} along a direction, so the {what} is not positive "
                f"definite: {advised} above {_rounded_up(damping - met)} (other directions may "
                f"need more){others.phrase(', or use {}', 'minres', 'gmres')}."
            )
        if advice:
            return IterationResult(
                x=x, residual=residual, converged=False, advice=advice, curvature=smallest
            )
        # The minimum of ½ xᵀAx − bᵀx along p is the step rᵀz / pᵀAp away.
        step = rz / curvature
        x, r = x + step * p, r - step * product
        residual = norm_of(r) / scale
        z = r if precondition is None else precondition(r)
        # The next direction is conjugate to all earlier ones: pᵀ A p' = 0.
        previous, rz = rz, r @ z
        p = z + (rz / previous) * p
    converged = residual <= tol
    advice = (
        "" if converged else f"Raise {more}, add damping, or accept the truncation by a larger tol."
    )
    return IterationResult(
        x=x, residual=residual, converged=converged, advice=advice, curvature=smallest
    )


def _rounded_up(bound: float) -> str:
    """A bound, not negative, in three digits that are no less, but for a rounding of floats."""
    if not bound:
        return "0"
    unit = 10.0 ** (math.floor(math.log10(bound)) - 2)
    return f"{math.ceil(bound / unit) * unit:.3g}"
