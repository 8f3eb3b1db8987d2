"""`first_order`: treats the lower solution as a constant, so that only the direct gradient remains
(DARTS-1st).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mlo.hypergradient.base import Cotangent, Engine, Solve
from mlo.hypergradient.products import LinearSystem

__all__ = ["FirstOrder"]


@dataclass(frozen=True, kw_only=True)
class FirstOrder(Engine):
    """Drops the implicit term: the response of the problem has no derivative, and costs nothing."""

    name: ClassVar[str] = "first_order"
    drops_implicit_term: ClassVar[bool] = True

    def solve(self, system: LinearSystem, cotangent: Cotangent) -> Solve:
        return Solve(q=[None] * len(cotangent), report=self.report(system.problem))
