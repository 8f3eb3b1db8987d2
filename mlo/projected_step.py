"""The condition of a solution with `after_step`: it is a fixed point of projected steps.

A problem whose optimizer makes θ ← P(θ − η ∇L(θ, x), x) converges to a point with

    F(θ, x) = θ − P(θ − η (g(θ, x) + c θ), x) = 0,

with the optimizer's weight decay c and its gradient g = ∇L, clipped if the problem clips. With
momentum μ and dampening τ the buffer converges to (1 − τ) / (1 − μ) times g + c θ, so η is the
learning rate times this factor. (If P projects onto a set the rate does not matter; a threshold
acts against it.) Without a clip, with D = ∂P/∂u at u = θ − η (∇L + c θ) and the Hessian H,

    A = ∂F/∂θ = I − D (I − η (H + c I)),

which is not symmetric in general, though H is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import Optimizer

from mlo.backward import gradients
from mlo.errors import EngineError
from mlo.gradient_norm import clip
from mlo.inner_optimizer import innermost
from mlo.optimizer_traits import l2_penalty
from mlo.problem import Problem, Tensors
from mlo.solution import Evaluation

__all__ = ["ProjectedStep"]


@dataclass(frozen=True, kw_only=True)
class ProjectedStep:
    """F of a problem with `after_step`: the residual of its fixed point (see `Residual`).

    Attributes:
        rates: parameter → η, the effective learning rate of its steps at rest; negative if its
            optimizer maximizes.
        decay: parameter → c, the coefficient of its optimizer's L2 penalty.
    """

    rates: Mapping[str, float]
    decay: Mapping[str, float]

    @classmethod
    def of(cls, problem: Problem) -> ProjectedStep:
        """The condition at the learning rates that the optimizers have now.

        Raises:
            EngineError: if a rate is zero, so that every point is a fixed point, or a momentum is
                1.
        """
        name_of = {id(parameter): key for key, parameter in problem.parameters.items()}
        rates: dict[str, float] = {}
        for optimizer in problem.optimizers.values():
            for group in optimizer.param_groups:
                rate = _rate_at_rest(problem.name, optimizer, group)
                rates |= {name_of[id(p)]: rate for p in group["params"] if id(p) in name_of}
        if still := [name for name in problem.parameters if rates[name] == 0.0]:
            raise EngineError(
                f"Problem {problem.name!r}: the learning rate of {still[0]!r} is zero. A solution "
                "with after_step is a fixed point of projected steps, and with steps of length "
                "zero every point is one. Give the optimizer the rate that the solver has used."
            )
        return cls(rates=rates, decay=l2_penalty(problem))

    @contextmanager
    def __call__(
        self, evaluation: Evaluation, parameters: Tensors, reads: dict[str, Tensors]
    ) -> Iterator[Tensors]:
        """Yields F by parameter, differentiable in `parameters` and `reads`."""
        with self.moved(evaluation, parameters, reads, create_graph=True) as u:
            after = evaluation.after_step(u, reads)
            yield {name: theta - after[name] for name, theta in parameters.items()}

    @contextmanager
    def moved(
        self,
        evaluation: Evaluation,
        parameters: Tensors,
        reads: Mapping[str, Tensors],
        *,
        create_graph: bool = False,
    ) -> Iterator[Tensors]:
        """Yields u = θ − η (∇L + c θ), to which the projection is applied."""
        with evaluation.losses(parameters, reads) as losses:
            g: Tensors = {}
            problem = evaluation.loss.problem
            for player, members in problem.player_parameters.items():
                own = [parameters[name] for name in members]
                found = gradients(losses[player], own, create_graph=create_graph, retain_graph=True)
                g |= zip(members, found, strict=True)
            if problem.grad_clip is not None:
                g = clip(g, problem.grad_clip)
            u: Tensors = {}
            for name, theta in parameters.items():
                u[name] = theta - self.rates[name] * (g[name] + self.decay[name] * theta)
            yield u


def _rate_at_rest(problem: str, optimizer: Optimizer, group: Mapping[str, Any]) -> float:
    """η of a group: its learning rate times what momentum makes of a constant gradient."""
    optimizer = innermost(optimizer)
    if group.get("lr") is None:
        raise EngineError(
            f"Problem {problem!r}: its {type(optimizer).__name__} has no learning rate `lr`, but "
            "a solution with after_step is a fixed point of steps of that length. Use "
            "torch.optim.SGD, or mlo.implicit_solution with fixed_point= for your own solver."
        )
    rate = -float(group["lr"]) if group.get("maximize") else float(group["lr"])
    if type(optimizer) is not torch.optim.SGD or not group["momentum"]:
        return rate
    if not group["momentum"] < 1.0:
        raise EngineError(
            f"Problem {problem!r}: with a momentum of {group['momentum']:g} its steps never "
            "converge, but a solution with after_step is the point where they do. Use a momentum "
            "below 1."
        )
    # b = μ b + (1 − τ) g. With nesterov, where τ = 0, the step's g + μ b is g / (1 − μ) as well.
    return rate * (1.0 - float(group["dampening"])) / (1.0 - float(group["momentum"]))
