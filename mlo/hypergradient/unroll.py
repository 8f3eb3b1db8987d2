"""`unroll`: exact reverse mode through the optimizer's last K steps, momentum and second moments
included.

θ_{t+1}, s_{t+1} = step(θ_t, F(θ_t, x), s_t) with the optimizer's state s, for t = 0 … K-1; θ_0 and
s_0 are constants. Each step is one node of the autograd graph, whose backward re-evaluates the loss
at the recorded θ_t and differentiates that one step. So memory holds K copies of the parameters and
of the optimizer's state, and one step's graph at a time, however large K.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from mlo.errors import EngineError
from mlo.evaluation import alias, gradients
from mlo.hypergradient.base import Cotangent, Engine, Solve
from mlo.hypergradient.iterative import at_least_one
from mlo.hypergradient.products import LinearSystem

if TYPE_CHECKING:
    from mlo.problem import Tensors
    from mlo.response import Context, RecordedStep, Solution

__all__ = ["Unroll"]

StateKey = tuple[str, str]


@dataclass(frozen=True, kw_only=True)
class Unroll(Engine):
    """Differentiates the last `steps` steps of the optimizer; fewer where fewer were made since the
    start.

    A problem that has not moved yet is looked at one step ahead, like `one_step`. The state of a
    run does not hold the
    recorded steps: after a resume they are recorded anew (a warning says so where it matters), so
    use `steps` no larger than
    the problem's own `steps`.

    Reference: Franceschi et al., Forward and Reverse Gradient-Based Hyperparameter Optimization
    (2017), Algorithm 1;
    Maclaurin et al. (2015).
    """

    steps: int = 5

    name: ClassVar[str] = "unroll"
    differentiates_step: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least_one(self.name, "steps", self.steps)
        if not self.products.differentiable:
            raise EngineError(
                "Engine 'unroll' differentiates its steps by autograd; finite differences do not "
                "serve it."
            )

    @property
    def recorded_steps(self) -> int:
        return self.steps

    def solve(self, system: LinearSystem, cotangent: Cotangent) -> Solve:
        raise NotImplementedError(
            "unroll differentiates its steps as a chain of nodes and solves no system"
        )

    def respond(self, solution: Solution, context: Context) -> Tensors:
        first = solution.history[0]
        theta: Tensors = {
            name: value.detach() for name, value in first.evaluation.parameters.items()
        }
        state: dict[StateKey, Tensor] = {
            k: v.detach() for k, v in first.step.differentiable_state().items()
        }
        for index, recorded in enumerate(solution.history):
            last = index + 1 == len(solution.history)
            after = solution.value if last else solution.history[index + 1].evaluation.parameters
            after_state = {} if last else solution.history[index + 1].step.differentiable_state()
            node = _Node(
                solution=solution,
                recorded=recorded,
                names=tuple(theta),
                state_keys=tuple(state),
                after=tuple(after[name].detach() for name in theta),
                after_state_keys=tuple(after_state),
                after_state=tuple(after_state.values()),
                context=context if last else replace(context, reports=[]),
            )
            inputs = [
                t for item in recorded.evaluation.free_inputs for t in context.input(item).values()
            ]
            outputs = _Step.apply(node, *theta.values(), *state.values(), *inputs)
            theta = dict(zip(theta, outputs[: len(theta)], strict=True))
            state = dict(zip(after_state, outputs[len(theta) :], strict=True))
        return theta


@dataclass(frozen=True, kw_only=True, eq=False)
class _Node:
    """One recorded step in the chain: what it started from and what it made."""

    solution: Solution
    recorded: RecordedStep
    names: tuple[str, ...]
    state_keys: tuple[StateKey, ...]
    after: tuple[Tensor, ...]
    after_state_keys: tuple[StateKey, ...]
    after_state: tuple[Tensor, ...]
    context: Context


class _Step(torch.autograd.Function):
    """Forward: what a recorded step made. Backward: the vjp of that step in θ, the optimizer's
    state and the reads.
    """

    @staticmethod
    def forward(ctx: Any, node: _Node, *inputs: Tensor) -> tuple[Tensor, ...]:
        ctx.node = node
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)
        return (
            *(tensor.clone() for tensor in node.after),
            *(tensor.clone() for tensor in node.after_state),
        )

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        node: _Node = ctx.node
        wanted = ctx.needs_input_grad[1:]
        if all(cotangent is None for cotangent in cotangents) or not any(wanted):
            return (None,) * (1 + len(wanted))
        differentiate = torch.is_grad_enabled()
        with ExitStack() as stack, torch.enable_grad():
            grads = _pull_back(node, ctx.saved_tensors, wanted, cotangents, differentiate, stack)
        node.context.reports.append(
            node.solution.engine.report(node.solution.name, iterations=len(node.solution.history))
        )
        return (None, *grads)


def _pull_back(
    node: _Node,
    saved: Sequence[Tensor],
    wanted: Sequence[bool],
    cotangents: Sequence[Tensor | None],
    differentiate: bool,
    stack: ExitStack,
) -> list[Tensor | None]:
    count, states = len(node.names), len(node.state_keys)
    recorded_state = node.recorded.step.differentiable_state()
    theta = {
        name: alias(
            saved[k], node.recorded.evaluation.parameters[name], differentiate=differentiate
        )
        for k, name in enumerate(node.names)
    }
    state = {
        key: alias(saved[count + k], recorded_state[key], differentiate=differentiate)
        for k, key in enumerate(node.state_keys)
    }
    call = node.solution.at(node.recorded).pullback(
        outputs=(),
        inputs=saved[count + states :],
        wanted=wanted[count + states :],
        differentiate=differentiate,
        context=node.context,
        stack=stack,
    )
    inputs = call.input_aliases()
    losses = stack.enter_context(call.losses(theta, inputs))
    gradient: Tensors = {}
    for player, members in node.recorded.evaluation.problem.player_parameters.items():
        found = gradients(losses[player], [theta[name] for name in members], create_graph=True)
        gradient |= zip(members, found, strict=True)
    moved, after_state = node.recorded.step.apply_with_state(theta, gradient, state)
    made = [moved[name] for name in node.names] + [
        after_state[key] for key in node.after_state_keys
    ]
    pairs = [
        (t, v) for t, v in zip(made, cotangents, strict=True) if v is not None and t.requires_grad
    ]
    sources = [*theta.values(), *state.values(), *inputs]
    asked = [t for t, want in zip(sources, wanted, strict=True) if want]
    asked_grads = iter(
        torch.autograd.grad(
            [t for t, _ in pairs],
            asked,
            grad_outputs=[v for _, v in pairs],
            create_graph=differentiate,
            allow_unused=True,
        )
        if pairs
        else [None] * len(asked)
    )
    return [next(asked_grads) if want else None for want in wanted]
