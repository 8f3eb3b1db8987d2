"""`one_step`: the solution is what the optimizer's last step made of the parameters before it
(DARTS, LFM-CW Eqs. 6-10).

θ' = step(θ, g) with g = F(θ, x), and θ is a constant, so dθ'/dx = (∂θ'/∂g) B and the response's
cotangent is Bᵀ (∂θ'/∂g)ᵀ v: the inverse is q = -(∂θ'/∂g)ᵀ v, which is ξ v for plain SGD with
learning rate ξ. F and B are taken at the parameters, batch, noise and read values of the step, not
at the current ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mlo.errors import EngineError
from mlo.hypergradient.products import (
    Autograd,
    Engine,
    FiniteDifference,
    LinearSystem,
    Solve,
)
from mlo.optimizer_step import OptimizerStep
from mlo.problem import Problem
from mlo.response import Cotangent, StepEngine, Stepped

__all__ = ["OneStep", "darts"]


@dataclass(frozen=True, kw_only=True)
class OneStep(Engine, StepEngine):
    """Differentiates the optimizer's last step, exactly: momentum, decay, Adam, clipping.

    Args:
        plain: treats the step as one of plain gradient descent with the optimizer's learning rate
            ξ, so that q = ξ v whatever the optimizer: the papers' equations to the letter. Their
            programs, as the default, unroll what the optimizer does.
        keep_graph: retains the gradient's graph until the response is differentiated, instead of
            recomputing it: same numbers, less time, more memory meanwhile. (A response that is
            differentiated twice is evaluated again all the same.)

    Raises:
        EngineError: if `keep_graph` is given with products other than "autograd".

    Reference: Liu et al., DARTS (2019), Eqs. 6-7; Gala and Xie, LFM-CW, Eqs. 6-18.
    """

    plain: bool = False
    keep_graph: bool = False
    name: ClassVar[str] = "one_step"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep_graph and not isinstance(self.products, Autograd):
            raise EngineError(
                "keep_graph=True is for exact products, which differentiate the gradient; "
                f"{self.products.name!r} does not. Use products='autograd' or leave keep_graph out."
            )

    @property
    def keeps_graph(self) -> bool:
        return self.keep_graph

    @property
    def label(self) -> str:
        """`darts` where its products are finite differences."""
        return "darts" if isinstance(self.products, FiniteDifference) else super().label

    def capture(self, problem: Problem) -> OptimizerStep:
        # A step that is linear in its gradient (SGD's) is known by its coefficient alone.
        return OptimizerStep.capture(problem, linear_state=False)

    def solve(self, system: LinearSystem, cotangent: Cotangent) -> Solve:
        solution = system.call.solution
        assert isinstance(solution, Stepped)
        step = solution.step
        # Without clipping, parameters that nothing above reads do not take part: a game's other
        # player costs nothing.
        clips = step.grad_clip is not None and not self.plain
        v_of: dict[str, Tensor] = {}
        for name, theta, v in zip(system.names, system.parameters, cotangent, strict=True):
            if v is not None or clips:
                v_of[name] = torch.zeros_like(theta) if v is None else v

        # θ' = c g + …, so −(∂θ'/∂g)ᵀ v = −c v: the step need not be made again.
        scaled: dict[str, Tensor] = {}
        for name, v in v_of.items():
            c = -step.learning_rate(name) if self.plain else step.gradient_coefficient(name)
            if c is not None:
                scaled[name] = -c * v
        linear = len(scaled) == len(v_of)
        if not linear or clips:
            g = self._gradient(system, solution, v_of)
            scaled = self._through_step(system, step, g, v_of, scaled if linear else None)
        q = [scaled.get(name) for name in system.names]
        return Solve(q=q, report=self.report(system.problem))

    def _gradient(
        self, system: LinearSystem, solution: Stepped, names: Iterable[str]
    ) -> dict[str, Tensor]:
        """The gradient that the step was made with, to differentiate the step in."""
        if not system.call.differentiate:
            return {name: solution.gradient[name].detach().requires_grad_() for name in names}
        with torch.enable_grad():
            found = dict(zip(system.names, system.gradient(), strict=True))
        return {name: found[name] for name in names}

    def _through_step(
        self,
        system: LinearSystem,
        step: OptimizerStep,
        g: dict[str, Tensor],
        v_of: dict[str, Tensor],
        scaled: dict[str, Tensor] | None,
    ) -> dict[str, Tensor]:
        """−(∂θ'/∂g)ᵀ v; of a linear step that clips −(∂ clipped / ∂g)ᵀ c v: `scaled` is −c v."""
        with torch.enable_grad():
            if scaled is not None:
                after, minus_v = step.clipped(g), scaled
            else:
                parameters = system.call.solution.evaluation.parameters
                after = step.apply({name: parameters[name].detach() for name in g}, g)
                minus_v = {name: -v for name, v in v_of.items()}
        found = torch.autograd.grad(
            [after[name] for name in g],
            list(g.values()),
            grad_outputs=[minus_v[name] for name in g],
            create_graph=system.call.differentiate,
            allow_unused=True,
        )
        return {name: q for name, q in zip(g, found, strict=True) if q is not None}


def darts(*, step: float | str = "adaptive", plain: bool = False) -> OneStep:
    """The preset `darts`: one step × finite differences.

    Args:
        step: step size rule of the difference; "darts" is the original's 0.01 / ‖v‖ (see
            `FiniteDifference`).
        plain: see `OneStep`.
    """
    return OneStep(products=FiniteDifference(step=step), plain=plain)
