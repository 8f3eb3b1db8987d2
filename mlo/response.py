"""The response of a lower problem: its solution as a tensor whose backward pass is its
hypergradient engine.

w*(x) solves F(w, x) = 0, so A dw + B dx = 0 with A = dF/dw and B = dF/dx, and dw/dx = -A^-1 B. An
upper loss sees w* as the output of a `torch.autograd.Function` whose inputs are everything that F
reads. Its backward receives the cotangent v of w* and returns -B^T A^-T v. PyTorch sums the
cotangents of all paths before it runs a node, so each problem's inverse product is done once
however many paths lead to it, and direct and implicit terms add up by themselves.

The backward is written as a differentiable function of its saved tensors: under `create_graph` it
can be differentiated again, which is what a problem in the middle needs, whose own gradient
contains the response of the one below it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mlo.errors import EngineError
from mlo.evaluation import Evaluation, GradientGraph, Input, alias
from mlo.problem import Tensors
from mlo.records import SolveReport
from mlo.shared_parts import SharedParts

if TYPE_CHECKING:
    from mlo.hypergradient.base import Engine
    from mlo.hypergradient.optimizer_step import OptimizerStep

__all__ = ["Context", "Pullback", "RecordedStep", "Solution", "response"]


@dataclass(frozen=True, kw_only=True, eq=False)
class RecordedStep:
    """One step of a problem's optimizer: where its gradient was evaluated, and the optimizer before
    it.
    """

    evaluation: Evaluation
    step: OptimizerStep


@dataclass(frozen=True, kw_only=True, eq=False)
class Solution:
    """The current solution of a problem, and how it came to be.

    Attributes:
        value: the problem's current parameters.
        evaluation: where the solution's derivative is taken: for engines that differentiate the
            optimizer's step, the evaluation that the step was made from; for implicit ones, the
            current point.
        step: the optimizer's step as it was made, for engines that differentiate it.
        gradient: the gradient that this step used.
        graph: the same with its graph, where the engine keeps it.
        history: the last steps, oldest first, for engines that differentiate more than one.
        memory: what the problem's engine keeps from one solve to the next (warm starts): name →
            tensor.
    """

    name: str
    engine: Engine
    value: Tensors
    evaluation: Evaluation
    step: OptimizerStep | None = None
    gradient: Tensors | None = None
    graph: GradientGraph | None = None
    history: tuple[RecordedStep, ...] = ()
    memory: dict[str, Tensor] = field(default_factory=dict)

    def at(self, recorded: RecordedStep) -> Solution:
        """The same solution with its derivative taken at one of the recorded steps."""
        return replace(self, evaluation=recorded.evaluation, step=recorded.step)

    def pullback(
        self,
        *,
        outputs: Sequence[Tensor],
        inputs: Sequence[Tensor],
        wanted: Sequence[bool],
        differentiate: bool,
        context: Context,
        stack: ExitStack,
    ) -> Pullback:
        """Describes one call of the response's backward (see `Pullback`)."""
        return Pullback(
            solution=self,
            outputs=outputs,
            inputs=inputs,
            wanted=wanted,
            differentiate=differentiate,
            context=context,
            stack=stack,
        )

    @cached_property
    def free_inputs(self) -> tuple[Input, ...]:
        """What the solution is a function of, each once (see `Evaluation.free_inputs`), over all
        recorded steps.
        """
        found = {
            (item.name, id(item.solution)): item
            for evaluation in [self.evaluation, *(recorded.evaluation for recorded in self.history)]
            for item in evaluation.free_inputs
        }
        return tuple(found.values())


@dataclass(kw_only=True)
class Context:
    """The tensors that stand for problems while one total gradient is computed, and the reports of
    its solves.

    Attributes:
        values: problem → parameters, for problems seen by value.
        lowers: problem → solution, for problems below the one whose gradient is computed.
        responses: id of a solution → its response, made once however many losses read it.
        asker: whose gradient it is, which is what a cotangent is a cotangent of. Engines that go on
            from one solve to the next keep their memory by it, since several upper problems may ask
            for the response of one lower problem.
        fixed: problems whose solutions are taken for constants.
    """

    values: dict[str, Tensors]
    lowers: Mapping[str, Solution] = field(default_factory=dict)
    responses: dict[int, Tensors] = field(default_factory=dict)
    reports: list[SolveReport] = field(default_factory=list)
    asker: str = ""
    fixed: frozenset[str] = frozenset()

    def value(self, name: str) -> Tensors:
        """The tensors that stand for the problem `name`: a response where it lies below, else its
        value.
        """
        if name in self.values:
            return self.values[name]
        return response(self.lowers[name], self)

    def input(self, item: Input) -> Tensors:
        """The tensors of one input of a solution."""
        return self.value(item.name) if item.solution is None else response(item.solution, self)


def response(solution: Solution, context: Context) -> Tensors:
    """Returns the parameters of `solution` as a differentiable function of everything that they
    depend on.
    """
    known = context.responses.get(id(solution))
    if known is not None:
        return known
    tensors = {name: value.detach() for name, value in solution.value.items()}
    if not solution.engine.drops_implicit_term and solution.name not in context.fixed:
        responded = solution.engine.respond(solution, context)
        if responded is None:
            inputs = solution.evaluation.free_inputs
            flat = [tensor for item in inputs for tensor in context.input(item).values()]
            outputs = _Response.apply(solution, context, *flat)
            responded = dict(zip(tensors, outputs, strict=True))
        tensors = responded
    context.responses[id(solution)] = tensors
    return tensors


class _Response(torch.autograd.Function):
    """Forward: the solution's current parameters. Backward: the engine's product with its
    transposed Jacobian.
    """

    @staticmethod
    def forward(
        ctx: Any, solution: Solution, context: Context, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        outputs = tuple(value.detach() for value in solution.value.values())
        ctx.solution, ctx.context = solution, context
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*outputs, *inputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        solution: Solution = ctx.solution
        differentiate = torch.is_grad_enabled()
        if differentiate and not solution.engine.differentiable:
            raise EngineError(
                f"The response of problem {solution.name!r} is differentiated twice, which its "
                f"engine {solution.engine.label!r} cannot be. Give it an engine with autograd "
                "products, such as 'one_step' or 'direct'."
            )
        wanted = ctx.needs_input_grad[2:]
        if all(cotangent is None for cotangent in cotangents) or not any(wanted):
            return (None,) * (2 + len(wanted))
        saved = ctx.saved_tensors
        outputs, inputs = saved[: len(cotangents)], saved[len(cotangents) :]
        with ExitStack() as stack:
            call = solution.pullback(
                outputs=outputs,
                inputs=inputs,
                wanted=wanted,
                differentiate=differentiate,
                context=ctx.context,
                stack=stack,
            )
            grads, report = solution.engine.pullback(call, cotangents)
        ctx.context.reports.append(report)
        return (None, None, *grads)


@dataclass(frozen=True, kw_only=True, eq=False)
class Pullback:
    """One call of a response's backward: the saved tensors, and a way to re-evaluate the loss on
    aliases of them.

    Partial derivatives are taken with respect to fresh aliases, so that a product of one argument
    does not flow into another that depends on it.

    Attributes:
        outputs: the saved outputs, which stand for the solution.
        inputs: the saved inputs, flat, in the order of `solution.evaluation.free_inputs`.
        wanted: for each input whether its gradient is asked for.
        differentiate: whether the pullback must itself be differentiable.
        context: whose gradient asks, and where the solves of responses inside the loss are
            reported.
        stack: keeps re-evaluations open whose backward passes run until the pullback ends.
    """

    solution: Solution
    outputs: Sequence[Tensor]
    inputs: Sequence[Tensor]
    wanted: Sequence[bool]
    differentiate: bool
    context: Context
    stack: ExitStack

    def parameter_aliases(self) -> Tensors:
        """The point at which the derivative is taken, as tensors that require gradients.

        Engines that differentiate the optimizer's step work at the parameters before it, which are
        constants; the others at the solution, through which a second derivative flows.
        """
        parameters = self.solution.evaluation.parameters
        if self.differentiate and not self.solution.engine.differentiates_step:
            return {
                key: out.view_as(out) for key, out in zip(parameters, self.outputs, strict=True)
            }
        return {key: value.detach().requires_grad_() for key, value in parameters.items()}

    def input_aliases(self) -> list[Tensor]:
        """The inputs at the values that they had in the evaluation, as tensors that require
        gradients where wanted.
        """
        recorded: list[Tensor | None] = []
        for item in self.solution.evaluation.free_inputs:
            if item.solution is not None:
                recorded += [None] * len(item.solution.value)
            else:
                recorded += self.solution.evaluation.uppers[item.name].values()
        return [
            alias(
                saved,
                saved if value is None else value,
                differentiate=self.differentiate,
                wanted=wanted,
            )
            for saved, value, wanted in zip(self.inputs, recorded, self.wanted, strict=True)
        ]

    def wanted_of(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Of tensors that stand for the inputs, those whose gradient is asked for."""
        return [tensor for tensor, want in zip(inputs, self.wanted, strict=True) if want]

    def per_input(self, found: Sequence[Tensor]) -> list[Tensor | None]:
        """Puts one entry for each wanted input into the order of all inputs, None for the
        others.
        """
        entries = iter(found)
        return [next(entries) if want else None for want in self.wanted]

    @contextmanager
    def losses(
        self,
        parameters: Tensors,
        inputs: Sequence[Tensor],
        *,
        players: Collection[str] | None = None,
        parts: SharedParts | None = None,
    ) -> Iterator[dict[str, Tensor]]:
        """Re-evaluates the problem's loss at `parameters` and `inputs` (flat); yields player →
        scalar.

        Responses that depend on this problem are made again inside, so the loss is the *total* one.
        The gradients must be taken inside the context. `players` and `parts` are those of
        `Evaluation.losses`.
        """
        evaluation = self.solution.evaluation
        values: dict[str, Tensors] = {evaluation.problem.name: parameters}
        responses: dict[int, Tensors] = {}
        rest = list(inputs)
        for item in evaluation.free_inputs:
            names = self._names(item)
            tensors, rest = dict(zip(names, rest[: len(names)], strict=True)), rest[len(names) :]
            if item.solution is None:
                values[item.name] = tensors
            else:
                responses[id(item.solution)] = tensors
        context = Context(
            values=values,
            lowers=evaluation.lowers,
            responses=responses,
            reports=self.context.reports,
            asker=f"{self.context.asker}/{self.solution.name}",
            fixed=self.context.fixed,
        )
        reads = {name: context.value(name) for name in evaluation.reads}
        try:
            with evaluation.losses(parameters, reads, players=players, parts=parts) as losses:
                yield losses
        finally:
            responses.clear()  # as in `total_gradient`: a circle that nothing would free

    def _names(self, item: Input) -> Sequence[str]:
        if item.solution is not None:
            return tuple(item.solution.value)
        return tuple(self.solution.evaluation.uppers[item.name])
