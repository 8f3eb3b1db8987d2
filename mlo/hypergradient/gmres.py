"""`gmres`: generalized minimal residuals, for Jacobians that are not symmetric, as of games."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mlo.hypergradient.iterative import FlatOperator, IterationResult, IterativeEngine
from mlo.hypergradient.options import count, number
from mlo.hypergradient.products import LinearSystem
from mlo.tensors import norm_of

__all__ = ["Gmres"]


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
        # Each cycle solves for a correction d with Aᵀ d = r, from an empty basis.
        while True:
            correction, r, taken = self._cycle(
                operator, r, min(self.restart, self.max_steps - steps), scale
            )
            x, steps = x + correction, steps + taken
            residual = norm_of(r) / scale
            if residual <= self.tol or steps >= self.max_steps or taken == 0:
                break
        converged = residual <= self.tol
        advice = (
            ""
            if converged
            else "Raise max_steps and restart, or add damping (strongly coupled games need it)."
        )
        return IterationResult(x=x, residual=residual, converged=converged, advice=advice)

    def _cycle(
        self, operator: FlatOperator, b: Tensor, steps: int, scale: float
    ) -> tuple[Tensor, Tensor, int]:
        """Minimises ‖b − Aᵀ x‖ over the Krylov space of b.

        Returns:
            x, the residual vector b − Aᵀ x, and the number of products used.
        """
        size = b.norm()
        if float(size.detach()) == 0.0:
            return torch.zeros_like(b), b, 0
        # An orthonormal basis of the Krylov space, and Aᵀ of each of its vectors.
        basis, images = [b / size], []
        residual, x = b, torch.zeros_like(b)
        for _ in range(steps):
            image = operator(basis[-1])
            images.append(image)

            # x = Σ cᵢ basisᵢ has Aᵀ x = Σ cᵢ imagesᵢ, so the best c solves a least-squares problem
            # with few columns.
            reach = torch.stack(images, dim=1)
            coefficients = torch.linalg.lstsq(reach, b.unsqueeze(1)).solution.squeeze(1)
            residual = b - reach @ coefficients
            x = torch.stack(basis, dim=1) @ coefficients

            # Arnoldi: the part of Aᵀ u that is new is the next basis vector. Orthogonalising twice
            # keeps the basis orthogonal up to rounding.
            w = image
            for _ in range(2):
                for u in basis:
                    w = w - (u @ w) * u
            norm = w.norm()
            small = torch.finfo(b.dtype).eps * norm_of(image)
            if norm_of(residual) <= self.tol * scale or float(norm.detach()) <= small:
                break
            basis.append(w / norm)
        return x, residual, len(images)
