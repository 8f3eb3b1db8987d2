"""`unroll`: exact reverse mode through the optimizer's last K steps, momentum included.

θ_{t+1}, s_{t+1} = step(θ_t, F(θ_t, x), s_t) with the optimizer's state s, for t = 0 … K-1. θ_0 and
s_0 are constants; or θ_0 is the value of an upper problem (`restart_from`). Each step is one node
of the autograd graph, whose backward re-evaluates the loss at the recorded θ_t and differentiates
that one step. So memory holds K copies of the parameters and of the optimizer's state, but only one
step's graph at a time, however large K is.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from mlo.backward import gradients
from mlo.hypergradient.double_backward import check_third_derivative, explains_double_backward
from mlo.hypergradient.options import count
from mlo.optimizer_step import StateKey
from mlo.optimizer_traits import acts_around_step
from mlo.problem import Tensors
from mlo.response import Pullback, alias
from mlo.solution import Input, Reading, RecordedStep, Solution, StepEngine, Stepped

__all__ = ["Unroll"]


@dataclass(frozen=True, kw_only=True)
class Unroll(StepEngine):
    """Differentiates the last `steps` steps of the optimizer, or all if fewer were made.

    A problem that has not moved yet is seen one step ahead, as by `one_step`. The state of a run
    does not hold the recorded steps. After a resume they are recorded again, and a warning says so
    if it matters.

    With `steps` larger than the problem's own `steps` it goes back to earlier rounds. Their steps
    were made at earlier values of the upper problems. Each step is differentiated where it was
    made, and the derivatives are added as if all were in the latest value. That is an online
    method, not the derivative of any one function. Use `steps` no larger than the problem's own.

    Reference: Franceschi et al., Forward and Reverse Gradient-Based Hyperparameter Optimization
    (2017), Algorithm 1; Maclaurin et al. (2015).
    """

    steps: int = count(5)

    name: ClassVar[str] = "unroll"
    takes_start: ClassVar[bool] = True

    @property
    def recorded_steps(self) -> int:
        return self.steps

    def respond(self, solution: Solution, reading: Reading) -> Tensors:
        assert isinstance(solution, Stepped)
        # The chain begins at constants: the parameters and the state before the first step.
        first = solution.history[0]
        theta: Tensors = {name: v.detach() for name, v in first.evaluation.parameters.items()}
        if solution.start is not None:
            theta = solution.start.linked(theta, reading.of(Input(solution.start.problem, None)))
        state: dict[StateKey, Tensor] = {
            key: value.detach() for key, value in first.step.differentiable_state().items()
        }
        for index, recorded in enumerate(solution.history):
            # The next step started from this step's result; after the last step it is the solution.
            # Only the last node reports, so a chain counts as one solve.
            if index + 1 < len(solution.history):
                following = solution.history[index + 1]
                after = following.evaluation.parameters
                after_state = following.step.differentiable_state()
                of_step = replace(reading, reports=[])
            else:
                after, after_state, of_step = solution.value, {}, reading
            node = _Node(
                solution=solution,
                recorded=recorded,
                names=tuple(theta),
                state_keys=tuple(state),
                after=tuple(after[name].detach() for name in theta),
                after_state_keys=tuple(after_state),
                after_state=tuple(after_state.values()),
                reading=of_step,
            )
            # Each step has read the values and responses of its own time.
            inputs: list[Tensor] = []
            for item in recorded.evaluation.free_inputs:
                inputs += reading.of(item).values()
            outputs = _Step.apply(node, *theta.values(), *state.values(), *inputs)
            theta = dict(zip(theta, outputs[: len(theta)], strict=True))
            state = dict(zip(after_state, outputs[len(theta) :], strict=True))
        return theta


@dataclass(frozen=True, kw_only=True, eq=False)
class _Node:
    """One recorded step in the chain: what it started from and what it made."""

    solution: Stepped
    recorded: RecordedStep
    names: tuple[str, ...]
    state_keys: tuple[StateKey, ...]
    after: tuple[Tensor, ...]
    after_state_keys: tuple[StateKey, ...]
    after_state: tuple[Tensor, ...]
    reading: Reading


class _Step(torch.autograd.Function):
    """Forward: a recorded step's result. Backward: its vjp in θ, the state and the inputs."""

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
        node.reading.note(
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
    # Repeats one recorded step, now with its graph, and sends cotangents back through it. The
    # node's inputs, and so the gradients returned, are θ, the optimizer's state, then the reads.
    own, states = len(node.names), len(node.state_keys)
    evaluation = node.recorded.evaluation
    recorded_state = node.recorded.step.differentiable_state()

    # The point of the step: θ_t, s_t, and what the loss read.
    theta: Tensors = {}
    for tensor, name in zip(saved, node.names, strict=False):
        theta[name] = alias(tensor, evaluation.parameters[name], differentiate=differentiate)
    state: dict[StateKey, Tensor] = {}
    for tensor, key in zip(saved[own:], node.state_keys, strict=False):
        state[key] = alias(tensor, recorded_state[key], differentiate=differentiate)
    call = Pullback(
        solution=node.solution.at_step(node.recorded),
        outputs=(),
        inputs=saved[own + states :],
        wanted=wanted[own + states :],
        differentiate=differentiate,
        reading=node.reading,
        stack=stack,
    )
    call.check_repeats()
    inputs = call.input_aliases()

    # θ_{t+1}, s_{t+1} = step(θ_t, F(θ_t, x), s_t), then what `after_step` leaves of θ_{t+1}
    reads = stack.enter_context(call.reads_at(theta, inputs))
    losses = stack.enter_context(evaluation.losses(theta, reads))
    loss = evaluation.loss
    if differentiate and loss.advice.third and loss.checks.is_due("third"):
        variables = [*theta.values(), *inputs]
        check_third_derivative(loss.problem.name, losses.values(), variables, loss.advice)
    gradient: Tensors = {}
    for player, members in evaluation.loss.problem.player_parameters.items():
        found = gradients(losses[player], [theta[name] for name in members], create_graph=True)
        gradient |= zip(members, found, strict=True)
    step = evaluation.step_at(node.recorded.step, reads)
    moved, after_state = step.apply_with_state(theta, gradient, state)
    moved = evaluation.after_step(moved, reads)
    # With sync="final" the gradient is that of this process alone, and so is where the step ends.
    whole = loss.parallel is None or loss.parallel.exact
    if whole and acts_around_step(loss.problem):
        call.check_step(moved, dict(zip(node.names, node.after, strict=True)))
    made = [moved[name] for name in node.names]
    made += [after_state[key] for key in node.after_state_keys]

    # Only what depends on anything, and is read, passes a cotangent on.
    outputs: list[Tensor] = []
    entries: list[Tensor] = []
    for tensor, v in zip(made, cotangents, strict=True):
        if v is not None and tensor.requires_grad:
            outputs.append(tensor)
            entries.append(v)
    if not outputs:
        return [None] * len(wanted)
    sources = [*theta.values(), *state.values(), *inputs]
    asked = [tensor for tensor, want in zip(sources, wanted, strict=True) if want]
    with explains_double_backward(loss.problem.name, loss.advice):
        entry_of = torch.autograd.grad(
            outputs, asked, grad_outputs=entries, create_graph=differentiate, allow_unused=True
        )
    pulled = iter(entry_of)
    return [next(pulled) if want else None for want in wanted]
