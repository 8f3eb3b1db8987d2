"""`first_order`: treats the lower solution as a constant; only the direct gradient remains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mlo.problem import Tensors
from mlo.response import AbstractEngine, Reading, Solution

__all__ = ["FirstOrder"]


@dataclass(frozen=True, kw_only=True)
class FirstOrder(AbstractEngine):
    """Drops the implicit term: the response has no derivative and costs nothing (DARTS-1st).

    Reference: Liu et al., DARTS (2019), section 2.3, "first-order approximation".
    """

    name: ClassVar[str] = "first_order"

    @property
    def uses_second_derivatives(self) -> bool:
        return False

    @property
    def takes_residuals(self) -> bool:
        return True

    def respond(self, solution: Solution, reading: Reading) -> Tensors:
        return solution.constants()
