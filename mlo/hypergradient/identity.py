"""`identity`: takes the Jacobian for the identity, q = v."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mlo.hypergradient.products import Engine, LinearSystem, Solve
from mlo.response import Cotangent

__all__ = ["Identity"]


@dataclass(frozen=True, kw_only=True)
class Identity(Engine):
    """q = v: one mixed product and no inverse at all (T1-T2 of Luketina et al. 2016; Betty's
    `darts`).
    """

    name: ClassVar[str] = "identity"

    def solve(self, system: LinearSystem, cotangent: Cotangent) -> Solve:
        return Solve(q=list(cotangent), report=self.report(system.problem))
