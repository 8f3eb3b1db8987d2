"""`one_step`: the solution is what the optimizer's last step made of the parameters before it
(DARTS, LFM-CW Eqs. 6-10).

θ' = step(θ, g) with g = F(θ, x), and θ is a constant, so dθ'/dx = (∂θ'/∂g) B and the response's
cotangent is Bᵀ (∂θ'/∂g)ᵀ v: the inverse is q = -(∂θ'/∂g)ᵀ v, which is ξ v for plain SGD with
learning rate ξ. F and B are taken at the parameters, batch, noise and read values of the step, not
at the current ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mlo.errors import EngineError
from mlo.hypergradient.base import Cotangent, Engine, Solve
from mlo.hypergradient.products import Autograd, FiniteDifference, LinearSystem

__all__ = ["OneStep", "darts"]


@dataclass(frozen=True, kw_only=True)
class OneStep(Engine):
    """Differentiates the optimizer's last step, exactly (momentum, weight decay, Adam's correction,
    clipping included).

    Args:
        plain: takes the step for one of plain gradient descent with the optimizer's learning rate
            ξ, so that q = ξ v
            whatever the optimizer: the papers' equations to the letter. Their programs, as the
                default, unroll what the
            optimizer does.
        keep_graph: computes the gradient of a step with its graph and keeps this until the response
            was differentiated, where
            it is otherwise computed again: the same numbers, less time, and the memory of the graph
                while those above compute
            theirs. (A response whose derivative is itself differentiated is evaluated again all the
            same.)

    Raises:
        EngineError: if `keep_graph` is given with products other than "autograd".

    Reference: Liu et al., DARTS (2019), Eqs. 6-7; Gala and Xie, LFM-CW, Eqs. 6-18.
    """

    plain: bool = False
    keep_graph: bool = False
    name: ClassVar[str] = "one_step"
    differentiates_step: ClassVar[bool] = True
    applies_linear_steps: ClassVar[bool] = False

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

    def solve(self, system: LinearSystem, cotangent: Cotangent) -> Solve:
        step, solution = system.step, system.call.solution
        assert step is not None and solution.gradient is not None
        # Without clipping, parameters that nothing above reads do not take part: a game's other
        # player costs nothing.
        clips = step.grad_clip is not None and not self.plain
        v_of = {
            name: torch.zeros_like(theta) if v is None else v
            for name, theta, v in zip(system.names, system.parameters, cotangent, strict=True)
            if v is not None or clips
        }
        names, v = list(v_of), list(v_of.values())
        # θ' = c g + …, so -(∂θ'/∂g)ᵀ v = -c v: the step need not be made again.
        gains = [-step.descent_rate(name) if self.plain else step.gain(name) for name in names]
        scaled = [-c * entry for c, entry in zip(gains, v, strict=True) if c is not None]
        linear = len(scaled) == len(v)
        if linear and not clips:
            return self._solved(system, names, scaled)
        with torch.enable_grad():
            if system.call.differentiate:
                found = dict(zip(system.names, system.gradient(), strict=True))
                g = {name: found[name] for name in names}
            else:
                g = {name: solution.gradient[name].detach().requires_grad_() for name in names}
            if linear:  # -(∂θ'/∂g)ᵀ v = -(∂ clipped / ∂g)ᵀ c v
                after, minus_v = step.clipped(g), scaled
            else:
                minus_v = [-entry for entry in v]
                after = step.apply(
                    {name: solution.evaluation.parameters[name].detach() for name in names}, g
                )
        moved = [after[name] for name in names]
        found_q = torch.autograd.grad(
            moved,
            list(g.values()),
            grad_outputs=minus_v,
            create_graph=system.call.differentiate,
            allow_unused=True,
        )
        return self._solved(system, names, found_q)

    def _solved(
        self, system: LinearSystem, names: Sequence[str], q: Sequence[Tensor | None]
    ) -> Solve:
        """The solve with these entries of q at the parameters `names`."""
        q_of = dict(zip(names, q, strict=True))
        return Solve(
            q=[q_of.get(name) for name in system.names], report=self.report(system.problem)
        )


def darts(*, step: float | str = "adaptive", plain: bool = False) -> OneStep:
    """The preset `darts`: one step × finite differences.

    Args:
        step: step size rule of the difference; "darts" is the original's 0.01 / ‖v‖ (see
            `FiniteDifference`).
        plain: see `OneStep`.
    """
    return OneStep(products=FiniteDifference(step=step), plain=plain)
