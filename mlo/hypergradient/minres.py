"""`minres`: minimal residuals by the Lanczos process, for symmetric A with eigenvalues of either
sign.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mlo.hypergradient.iterative import FlatOperator, IterationResult, IterativeEngine
from mlo.hypergradient.options import count, number
from mlo.hypergradient.products import LinearSystem

__all__ = ["Minres"]


@dataclass(frozen=True, kw_only=True)
class Minres(IterativeEngine):
    """MINRES on (A + damping · I) q = v: its residual never grows, on indefinite A too (a saddle
    point of the loss).

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
        # Lanczos: A V_k = V_{k+1} T_k with T_k tridiagonal (diagonal a_k, off-diagonal beta_k). The
        # QR factorization of T_k is updated by one Givens rotation (c, s) a step; `rho` is the norm
        # of the residual, and the columns of V_k R_k^-1 obey the three-term recurrence for
        # `direction`.
        x = torch.zeros_like(b)
        beta = b.norm()
        v, v_before = b / beta, torch.zeros_like(b)
        direction, direction_before = torch.zeros_like(b), torch.zeros_like(b)
        one, zero = torch.ones_like(beta), torch.zeros_like(beta)
        c, s, c_before, s_before = one, zero, one, zero
        rho, off = beta, zero
        tiny = torch.finfo(b.dtype).eps
        for _ in range(self.max_steps):
            w = operator(v) - off * v_before
            a = v @ w
            w = w - a * v
            off_next = w.norm()
            # Column k of R: the two earlier rotations act on (off, a), the new one removes
            # off_next.
            epsilon, rest = s_before * off, c_before * off
            delta, gamma_bar = c * rest + s * a, c * a - s * rest
            gamma = torch.sqrt(gamma_bar**2 + off_next**2)
            if float(gamma.detach()) <= tiny * scale:
                break  # A v is a combination of what is there already: singular
            c_before, s_before = c, s
            c, s = gamma_bar / gamma, off_next / gamma
            direction, direction_before = (
                (v - delta * direction - epsilon * direction_before) / gamma,
                direction,
            )
            x = x + (c * rho) * direction
            rho = -s * rho
            if abs(float(rho.detach())) <= self.tol * scale or float(off_next.detach()) <= tiny:
                break
            v, v_before, off = w / off_next, v, off_next
        residual = abs(float(rho.detach())) / scale
        converged = residual <= self.tol
        advice = (
            ""
            if converged
            else "Raise max_steps, add damping, or accept the truncation by a larger tol."
        )
        return IterationResult(x=x, residual=residual, converged=converged, advice=advice)
