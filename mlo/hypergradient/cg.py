"""`cg`: conjugate gradients, for symmetric positive definite A; negative curvature stops it and is
reported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mlo.hypergradient.iterative import (
    FlatOperator,
    IterativeEngine,
    Outcome,
    at_least_one,
    conjugate_gradients,
)
from mlo.hypergradient.products import LinearSystem

__all__ = ["ConjugateGradient"]


@dataclass(frozen=True, kw_only=True)
class ConjugateGradient(IterativeEngine):
    """Conjugate gradients on (A + damping · I) q = v.

    At a direction of curvature that is not positive the iteration stops with what it has: A is not
    positive definite
    there, and a step along it would lead away from every solution.

    Attributes:
        max_steps: most products with A.
        tol: relative residual at which it stops.

    Reference: Hestenes and Stiefel (1952); for hypergradients Pedregosa, HOAG (2016), Rajeswaran et
        al., iMAML (2019).
    """

    max_steps: int = 20
    tol: float = 1e-6

    name: ClassVar[str] = "cg"
    needs_symmetry: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self.name, "max_steps", self.max_steps)

    def iterate(
        self, operator: FlatOperator, b: Tensor, scale: float, system: LinearSystem
    ) -> Outcome:
        return conjugate_gradients(operator, b, scale, max_steps=self.max_steps, tol=self.tol)
