"""`minres`: minimal residuals, for symmetric A with eigenvalues of either sign."""

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
)
from mlo.hypergradient.options import count, number
from mlo.hypergradient.products import LinearSystem

__all__ = ["Minres"]


@dataclass(frozen=True, kw_only=True)
class Minres(IterativeEngine):
    """MINRES on (A + damping · I) q = v.

    Its residual never grows, even if A is indefinite (at a saddle point of the loss).

    Attributes:
        max_steps: most products with A.
        tol: relative residual at which it stops.

    Reference: Paige and Saunders, Solution of Sparse Indefinite Systems of Linear Equations (1975).
    """

    max_steps: int = count(20)
    tol: float = number(1e-6)

    name: ClassVar[str] = "minres"
    needs_symmetry: ClassVar[bool] = True

    def iterate(
        self, operator: FlatOperator, b: Tensor, scale: float, system: LinearSystem
    ) -> IterationResult:
        # Lanczos: A V_k = V_{k+1} T_k, where T_k is tridiagonal with `a` on the diagonal and `off`
        # beside it. So ‖b − A V_k y‖ = ‖β e₁ − T_k y‖ with β = ‖b‖, a small least-squares problem.
        # Its QR factorization gains one Givens rotation (c, s) per step. Then |rho| is the norm of
        # the residual, and `direction` is the newest column of V_k R_k⁻¹, along which x moves.
        x = torch.zeros_like(b)
        beta = b.norm()
        if float(beta.detach()) <= self.tol * scale:  # a warm start may leave nothing to do
            return IterationResult(x=x, residual=float(beta.detach()) / scale, converged=True)
        advice = "Raise max_steps, add damping, or accept the truncation by a larger tol."
        v, v_before = b / beta, torch.zeros_like(b)
        direction, direction_before = torch.zeros_like(b), torch.zeros_like(b)
        one, zero = torch.ones_like(beta), torch.zeros_like(beta)
        c, s, c_before, s_before = one, zero, one, zero
        rho, off = beta, zero
        # Rounding errors of T_k are of the order of epsilon times ‖A‖, which its largest entry so
        # far bounds from below.
        size, rounding = 0.0, 10.0 * torch.finfo(b.dtype).eps
        for _ in range(self.max_steps):
            # One Lanczos step. A v is orthogonal to all basis vectors but the last two, since A is
            # symmetric.
            w = operator(v) - off * v_before
            a = v @ w
            w = w - a * v
            off_next = w.norm()
            found = [abs(float(entry.detach())) for entry in (a, off_next)]
            if not all(map(math.isfinite, found)):
                advice = ADVICE_NOT_FINITE
                break
            size = max(size, *found)

            # Column k of R is (epsilon, delta, gamma): the last two rotations act on (off, a), and
            # the new one turns (gamma_bar, off_next) into (gamma, 0).
            epsilon, rest = s_before * off, c_before * off
            delta, gamma_bar = c * rest + s * a, c * a - s * rest
            gamma = torch.sqrt(gamma_bar**2 + off_next**2)
            if float(gamma.detach()) <= rounding * size:
                advice = ADVICE_SINGULAR  # A v is a combination of what is there already
                break

            c_before, s_before = c, s
            c, s = gamma_bar / gamma, off_next / gamma
            # V = D R, solved for the last column of D.
            direction, direction_before = (
                (v - delta * direction - epsilon * direction_before) / gamma,
                direction,
            )
            # The rotation splits what was left, rho: c rho is reached, −s rho is left.
            x = x + (c * rho) * direction
            rho = -s * rho
            if abs(float(rho.detach())) <= self.tol * scale or found[1] <= rounding * size:
                break
            v, v_before, off = w / off_next, v, off_next
        residual = abs(float(rho.detach())) / scale
        converged = residual <= self.tol
        return IterationResult(
            x=x, residual=residual, converged=converged, advice="" if converged else advice
        )
