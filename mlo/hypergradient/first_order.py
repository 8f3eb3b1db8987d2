"""`first_order`: treats the lower solution as a constant; only the direct gradient remains.

A solution that started from an upper problem's value x has moved by θ − x, which is treated as
constant. So dθ/dx is the identity (first-order MAML: Finn et al. 2017, section 5.2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mlo.problem import Tensors
from mlo.solution import AbstractEngine, Input, Reading, Solution, Started

__all__ = ["FirstOrder"]


@dataclass(frozen=True, kw_only=True)
class FirstOrder(AbstractEngine):
    """Drops the implicit term: the response has no derivative and costs nothing (DARTS-1st).

    Reference: Liu et al., DARTS (2019), section 2.3, "first-order approximation".
    """

    name: ClassVar[str] = "first_order"
    takes_start: ClassVar[bool] = True

    @property
    def uses_second_derivatives(self) -> bool:
        return False

    @property
    def takes_residuals(self) -> bool:
        return True

    def respond(self, solution: Solution, reading: Reading) -> Tensors:
        if not isinstance(solution, Started):
            return solution.constants()
        source = reading.of(Input(solution.start.problem, None))
        return solution.start.linked(solution.value, source)
