"""`normal_cg`: conjugate gradients on the normal equations, for Jacobians that are not symmetric.

Aᵀ q = v is solved by the q that minimises ½ ‖v − Aᵀ q‖², whose gradient vanishes where

    A Aᵀ q = A v .

A Aᵀ is symmetric and positive semidefinite whatever A is, so conjugate gradients serve. Each step
takes one product with Aᵀ and one with A. The condition number is squared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mlo.hypergradient.iterative import (
    ADVICE_NOT_FINITE,
    ADVICE_SINGULAR,
    FlatOperator,
    IterationResult,
    IterativeEngine,
    power_of_two,
)
from mlo.hypergradient.options import count, number
from mlo.hypergradient.products import LinearSystem
from mlo.tensors import norm_of

__all__ = ["NormalConjugateGradient"]


@dataclass(frozen=True, kw_only=True)
class NormalConjugateGradient(IterativeEngine):
    """Conjugate gradients on A Aᵀ q = A v (CGNR), for games and indefinite or non-symmetric A.

    Unlike `gmres` it keeps four vectors however many steps it makes, and its residual never grows.
    If A is singular it converges to the least-squares solution of least norm.

    Attributes:
        max_steps: most steps, of two products each.
        tol: relative residual ‖v − Aᵀ q‖ / ‖v‖ at which it stops.

    Reference: Hestenes and Stiefel (1952), in the form CGLS of Paige and Saunders, LSQR (1982); for
    hypergradients Grazzi et al., On the Iteration Complexity of Hypergradient Computation (2020).
    """

    max_steps: int = count(40)
    tol: float = number(1e-6)

    name: ClassVar[str] = "normal_cg"

    def iterate(
        self, operator: FlatOperator, b: Tensor, scale: float, system: LinearSystem
    ) -> IterationResult:
        # r = b − Aᵀ x is the residual, s = A r the negative gradient of ½ ‖r‖², p the direction.
        x, r = torch.zeros_like(b), b
        residual = norm_of(r) / scale
        # Below epsilon² the r of the recursion says nothing, and its squares underflow.
        epsilon = torch.finfo(b.dtype).eps
        tol = max(self.tol, epsilon**2)
        if residual <= tol:
            return IterationResult(x=x, residual=residual, converged=True)
        s = operator.transposed(r)
        # The fourth powers of A below would underflow for a small A. So A is divided by about
        # ‖A r‖ / ‖r‖, which bounds ‖A‖ from below; by a power of two, which rounds nothing.
        norm = power_of_two(norm_of(s) / norm_of(r))
        p = s = s / norm
        size, reach, advice = s @ s, norm_of(s) / norm_of(r), ADVICE_SLOW
        for _ in range(self.max_steps):
            # At s = 0 the residual cannot fall further: v has a part that no Aᵀ q reaches.
            along = norm_of(s)
            if not along > epsilon * reach * residual * scale:
                advice = ADVICE_SINGULAR if math.isfinite(along) else ADVICE_NOT_FINITE
                break
            image = operator(p) / norm
            step = size / (image @ image)
            x, r = x + step * p, r - step * image
            residual = norm_of(r) / scale
            if residual <= tol:
                break
            s = operator.transposed(r) / norm
            previous, size = size, s @ s
            p = s + (size / previous) * p
        converged = residual <= tol
        return IterationResult(
            x=x / norm, residual=residual, converged=converged, advice="" if converged else advice
        )


ADVICE_SLOW = "Raise max_steps, or add damping: the normal equations square the condition number."
