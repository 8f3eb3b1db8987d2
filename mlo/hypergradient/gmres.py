"""`gmres`: generalized minimal residuals, for Jacobians that are not symmetric (games)."""

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
from mlo.tensors import norm_of

__all__ = ["Gmres"]

ADVICE_SLOW = "Raise max_steps and restart, or add damping (strongly coupled games need it)."


@dataclass(frozen=True, kw_only=True)
class Gmres(IterativeEngine):
    """GMRES(m) on (A + damping · I)ᵀ q = v, restarted every m products.

    Attributes:
        max_steps: most products with Aᵀ in all.
        restart: m, the number of basis vectors that are kept.
        tol: relative residual at which it stops.

    Reference: Saad and Schultz, GMRES (1986).
    """

    max_steps: int = count(40)
    restart: int = count(40)
    tol: float = number(1e-6)

    name: ClassVar[str] = "gmres"

    def iterate(
        self, operator: FlatOperator, b: Tensor, scale: float, system: LinearSystem
    ) -> IterationResult:
        x, r, steps = torch.zeros_like(b), b, 0
        residual, advice = norm_of(b) / scale, ADVICE_SLOW
        # Each cycle solves for a correction d with Aᵀ d = r, from an empty basis.
        while residual > self.tol and steps < self.max_steps:
            correction, r, taken, found = self._cycle(
                operator, r, min(self.restart, self.max_steps - steps), scale
            )
            x, steps = x + correction, steps + taken
            before, residual = residual, norm_of(r) / scale
            advice = found or advice
            # The Krylov space of r is a part of that of b, so if that has ended, no more is
            # reached. And a cycle that has reached nothing would repeat itself.
            if found or not residual < before:
                break
        converged = residual <= self.tol
        return IterationResult(
            x=x, residual=residual, converged=converged, advice="" if converged else advice
        )

    def _cycle(
        self, operator: FlatOperator, b: Tensor, steps: int, scale: float
    ) -> tuple[Tensor, Tensor, int, str]:
        """Minimises ‖b − Aᵀ x‖ over the Krylov space of b, which is not zero.

        Returns:
            x, the residual vector b − Aᵀ x, the number of products used, and advice if the space
            ended; otherwise an empty string.
        """
        # Arnoldi: Aᵀ V_k = V_{k+1} H_k with an orthonormal basis V of the Krylov space and a
        # Hessenberg matrix H_k [k + 1, k]. So ‖b − Aᵀ V_k y‖ = ‖β e₁ − H_k y‖ with β = ‖b‖: a small
        # least-squares problem, solved in float64 on the CPU.
        size = norm_of(b)
        basis = [b / size]
        hessenberg = torch.zeros(steps + 1, steps, dtype=torch.float64)
        start = torch.zeros(steps + 1, dtype=torch.float64)
        start[0] = size
        epsilon = torch.finfo(b.dtype).eps
        y, left, taken, advice = start[:0], start[:1], 0, ""
        while taken < steps:
            # What is new in Aᵀ u is the next basis vector. Orthogonalising twice keeps the basis
            # orthogonal up to rounding.
            w = operator(basis[-1])
            taken += 1
            entries = [torch.zeros((), dtype=b.dtype, device=b.device) for _ in basis]
            for _ in range(2):
                for row, u in enumerate(basis):
                    along = u @ w
                    w = torch.addcmul(w, u, along, value=-1.0)
                    entries[row] = entries[row] + along
            norm = w.norm()
            column = torch.stack([*entries, norm]).double().cpu()
            reach = float(column.norm())
            if not math.isfinite(reach):
                advice = ADVICE_NOT_FINITE
                break
            hessenberg[: taken + 1, taken - 1] = column

            # Singular values below the rounding errors of H count as zero.
            made, right = hessenberg[: taken + 1, :taken], start[: taken + 1]
            y = torch.linalg.lstsq(
                made, right.unsqueeze(1), rcond=10.0 * epsilon, driver="gelsd"
            ).solution.squeeze(1)
            left = right - made @ y
            ended = float(column[-1]) <= 10.0 * epsilon * reach
            if not ended:
                basis.append(w / norm)
            if float(left.norm()) <= self.tol * scale:
                break
            if ended:
                # The space ends. If a solution is in it, only rounding is left, which another cycle
                # reduces; a singular Jacobian leaves a part of the cotangent.
                if float(left.norm()) > math.sqrt(epsilon) * float(size):
                    advice = ADVICE_SINGULAR
                break
        x, residual = torch.zeros_like(b), torch.zeros_like(b)
        for weight, u in zip(y.tolist(), basis, strict=False):
            x = x + weight * u
        # (A space that has ended has no next vector.)
        for weight, u in zip(left.tolist(), basis, strict=False):
            residual = residual + weight * u
        return x, residual, taken, advice
