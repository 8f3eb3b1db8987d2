"""`identity`: treats the Jacobian as the identity, q = v."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mlo.hypergradient.products import Engine, LinearSystem, Solve
from mlo.response import Cotangent

__all__ = ["Identity"]


@dataclass(frozen=True, kw_only=True)
class Identity(Engine):
    """Takes q = v: one mixed product and no inverse at all.

    Reference: Luketina et al. (2016), T1-T2. Betty's `darts` does the same.
    """

    name: ClassVar[str] = "identity"

    def solve(self, system: LinearSystem, cotangent: Cotangent) -> Solve:
        return Solve(q=list(cotangent), report=self.report(system.problem))
