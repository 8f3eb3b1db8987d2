"""Checks that the step an optimizer makes is the one whose derivative engines take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mlo.advice import WITHOUT_STEPS, EngineAdvice
from mlo.backward import gradients
from mlo.check_schedule import CheckSchedule
from mlo.errors import ProblemError
from mlo.inner_optimizer import innermost, is_foreign
from mlo.optimizer_step import OptimizerStep
from mlo.optimizer_traits import has_code_around_step
from mlo.problem import Problem, Tensors
from mlo.solution import AbstractEngine, Evaluation
from mlo.tensors import in_precision, real_inner

__all__ = ["StepChecks", "check_schedulers"]

DERIVATIVE_TOLERANCE = 1e-2
"""Largest relative error of a step's derivative, which is compared in double precision."""

BESIDE = 1e-2
"""How far from the parameters `after_step` is examined, relative to their size."""


class StepChecks:
    """Compares steps that optimizers made with the steps that engines differentiate.

    The derivative of a step is that of the class's own code, run by a twin. Anything else that
    moved the parameters would be missing in it: hooks of the optimizer, the user's own method
    `step`, code under `no_grad` in a subclass.
    """

    def __init__(self) -> None:
        self._schedule = CheckSchedule()

    def are_due(self, problem: Problem) -> bool:
        """Whether the next step is checked.

        The first one always is. With hooks every step is, since a hook may begin to act at any
        time. The derivative of a class that is not torch.optim's is compared at steps 1, 2, 4, 8, …
        On the meta device there are no numbers to compare.
        """
        if problem.device.type == "meta":
            return False
        first = not self._schedule.was_noted(problem.name)
        at_power_of_two = self._schedule.is_due(problem.name)
        optimizers = problem.optimizers.values()
        if first or any(map(has_code_around_step, optimizers)):
            return True
        return at_power_of_two and any(map(is_foreign, map(innermost, optimizers)))

    def check(
        self,
        problem: Problem,
        engine: AbstractEngine,
        step: OptimizerStep,
        *,
        before: Tensors,
        gradient: Tensors,
        advice: EngineAdvice,
    ) -> None:
        """Checks a step that was just made.

        Args:
            problem: its parameters are those after the step.
            engine: what differentiates the step.
            step: the step with all state, captured before it was made.
            before: parameter → value before the step, for the parameters that moved.
            gradient: parameter → gradient that it was made with, before clipping.
            advice: names other engines.

        Raises:
            ProblemError: if the twin makes a different step, or one with a wrong derivative.
        """
        # First the value of the step: the twin must end where the optimizer ended.
        twin = step.apply(before, gradient, differentiated=False)
        for name, parameter in problem.parameters.items():
            if name in before and not _same_step(twin[name], parameter, before[name]):
                raise ProblemError(
                    f"Problem {problem.name!r}: its optimizer moved {name!r} to another place "
                    f"than {_twin_in_words(problem)} would, but the engine {engine.label!r} "
                    "differentiates the optimizer's own step, so that change would be missing. "
                    "Put the change into the loss (or use grad_clip=, or an optimizer whose "
                    "whole step is differentiable and whose state is in its `state` or "
                    "`param_groups`, not in attributes), or choose an engine that does not "
                    f"differentiate steps{advice.phrase(', such as {}', *WITHOUT_STEPS)}."
                )

        # Then its derivative, which torch.optim's classes need not prove.
        foreign = [o for o in map(innermost, problem.optimizers.values()) if is_foreign(o)]
        if not foreign:
            return
        error = step.derivative_error(before, gradient)
        if not error <= DERIVATIVE_TOLERANCE:
            raise ProblemError(
                f"Problem {problem.name!r}: the derivative of a step of "
                f"{type(foreign[0]).__name__}, or of the two with the "
                f"next, which the engine {engine.label!r} takes by its code with "
                f"differentiable=True, is off by a relative {error:.2g} from a finite difference. "
                "Code under torch.no_grad(), on .data or with numbers (.item()) changes the value "
                "and is missing in the derivative. Write it with differentiable operations if the "
                "option `differentiable` of the group is set, or choose an engine that does not "
                f"differentiate steps{advice.phrase(', such as {}', *WITHOUT_STEPS)}."
            )

    def check_bare(self, problem: Problem) -> None:
        """Refuses code around a step that is made by formula, because it would not be called.

        Raises:
            ProblemError: naming the optimizer.
        """
        for optimizer in problem.optimizers.values():
            if has_code_around_step(optimizer):
                raise ProblemError(
                    f"Problem {problem.name!r}: its {type(optimizer).__name__} has hooks around "
                    "its step, or its own `step`. With settings= the step is made by formula and "
                    "calls neither. Use before_update=, after_step= or after_update=."
                )

    def check_after_step(
        self,
        problem: Problem,
        evaluation: Evaluation,
        parameters: Tensors,
        reads: Mapping[str, Tensors],
    ) -> None:
        """Compares the derivative of `after_step` with a finite difference, at steps 1, 2, 4, …

        Args:
            problem: whose `after_step`.
            evaluation: of the step.
            parameters: those that the optimizers have moved, after their step.
            reads: problem → parameters that it reads.

        Raises:
            ProblemError: if they differ, as for code under `no_grad` or on `.data`.
        """
        due = self._schedule.is_due(f"after_step of {problem.name}")
        if not due or problem.device.type == "meta":
            return
        error = after_step_error(evaluation, parameters, reads)
        if not error <= DERIVATIVE_TOLERANCE:
            raise ProblemError(
                f"Problem {problem.name!r}: the derivative of its after_step is off by a relative "
                f"{error:.2g} from a finite difference of it. Code under torch.no_grad(), on .data "
                "or through numpy changes the value and is missing in the derivative. Write it "
                "with differentiable operations (mlo.constraints has the usual ones)."
            )


def check_schedulers(problem: Problem, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Refuses settings that a scheduler writes too.

    Args:
        problem: whose settings.
        settings: parameter → setting → value.

    Raises:
        ProblemError: naming the setting.
    """
    learned = {key for of_parameter in settings.values() for key in of_parameter}
    for scheduler in problem.schedulers.values():
        written = {"lr"}
        if getattr(scheduler, "cycle_momentum", False):
            written |= {"momentum", "betas"}
        if both := sorted(written & learned):
            raise ProblemError(
                f"Problem {problem.name!r}: both its scheduler and settings= set {both[0]!r}. "
                "Drop the scheduler, or multiply its schedule into the setting."
            )


def after_step_error(
    evaluation: Evaluation, parameters: Tensors, reads: Mapping[str, Tensors]
) -> float:
    """The relative error of the derivative of `after_step` in one direction.

    Args:
        evaluation: of the step.
        parameters: those that it is applied to.
        reads: problem → parameters that it reads.
    """
    # In double precision a difference is accurate across a distance so short that hardly any entry
    # crosses a kink. A function that insists on another dtype gets its own.
    own = next(iter(parameters.values())).dtype.to_real()
    try:
        error = _after_step_error(evaluation, parameters, reads, torch.float64, 1e-7)
    except RuntimeError:
        return _after_step_error(evaluation, parameters, reads, own, 1e-3)
    # A function that rounds inside (`.float()`) has no difference across so short a distance.
    if not error <= DERIVATIVE_TOLERANCE:
        error = min(error, _after_step_error(evaluation, parameters, reads, own, 1e-3))
    return error


@torch.enable_grad()
def _after_step_error(
    evaluation: Evaluation,
    parameters: Tensors,
    reads: Mapping[str, Tensors],
    dtype: torch.dtype,
    nearby: float,
) -> float:
    """The same in one dtype, by a difference across `nearby` times the size of a parameter."""
    fixed: dict[str, Tensors] = {}
    for name, tensors in reads.items():
        fixed[name] = {key: in_precision(tensor, dtype) for key, tensor in tensors.items()}
    noise = torch.Generator().manual_seed(0)
    theta: Tensors = {}
    u: Tensors = {}
    v: Tensors = {}
    for key, parameter in parameters.items():
        tensor = in_precision(parameter, dtype)
        draws = torch.randn(3, *tensor.shape, generator=noise).to(tensor)
        size = tensor.abs().square().mean().sqrt().clamp(min=1e-6)
        u[key], v[key] = draws[0] * size, draws[1]
        # Beside the point, because entries are often exactly on a bound, where no difference is
        # right.
        theta[key] = (tensor + BESIDE * size * draws[2]).requires_grad_()

    # ⟨(∂P/∂θ)ᵀ v, u⟩ by autograd, and ⟨v, P(θ + h u) − P(θ − h u)⟩ / 2h, should agree.
    after = evaluation.after_step(dict(theta), fixed)
    parts = [real_inner(after[key], v[key]) for key in after if after[key].requires_grad]
    exact = 0.0
    if parts:
        found = gradients(torch.stack(parts).sum(), list(theta.values()))
        exact = sum(float(real_inner(g, u[key])) for key, g in zip(theta, found, strict=True))
    sides = []
    for sign in (1.0, -1.0):
        moved = {key: t.detach() + sign * nearby * u[key] for key, t in theta.items()}
        result = evaluation.after_step(moved, fixed)
        sides.append(sum(float(real_inner(result[key].detach(), v[key])) for key in result))
    difference = (sides[0] - sides[1]) / (2.0 * nearby)
    scale = max(abs(exact), abs(difference))
    return abs(exact - difference) / scale if scale > 1e-6 else 0.0


def _twin_in_words(problem: Problem) -> str:
    """The step that the twin makes."""
    for optimizer in problem.optimizers.values():
        name, inner = type(optimizer).__name__, innermost(optimizer)
        if inner is not optimizer:
            return f"the step of {type(inner).__name__}, which it holds,"
        if has_code_around_step(optimizer):
            return f"the step of {name} without the hooks around it (register_step_post_hook, say)"
    names = sorted({type(optimizer).__name__ for optimizer in problem.optimizers.values()})
    return f"a step of {', '.join(names)} alone"


def _same_step(twin: Tensor, made: Tensor, before: Tensor) -> bool:
    """Whether two steps from `before` end at one place, up to rounding."""
    # Relative to the step's length, but never finer than the parameters can be represented.
    twin, made = twin.detach(), made.detach()
    rounding = 8.0 * torch.finfo(made.dtype).eps * float(made.norm() + before.norm())
    return float((twin - made).norm()) <= 1e-3 * float((made - before).norm()) + rounding
