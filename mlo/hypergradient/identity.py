"""`identity`: treats the Jacobian as the identity, q = v."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mlo.hypergradient.products import LinearSystem, Solve
from mlo.hypergradient.sweep import SweepEngine
from mlo.response import Cotangent

__all__ = ["Identity"]


@dataclass(frozen=True, kw_only=True)
class Identity(SweepEngine):
    """Takes q = v: one mixed product and no inverse at all.

    Reference: Luketina et al. (2016), T1-T2. Betty's `darts` does the same.
    """

    name: ClassVar[str] = "identity"

    def solve(self, system: LinearSystem, cotangent: Cotangent) -> Solve:
        return Solve(q=list(cotangent), report=self.report(system.problem))

    def applied(self, system: LinearSystem, direction: Sequence[Tensor]) -> list[Tensor]:
        return [-entry for entry in direction]
