"""The response of a lower problem: its solution as a tensor whose backward pass is its engine.

Let F(w, x) be the gradient in w of the lower loss, where x is everything that this loss reads.
w*(x) solves F(w, x) = 0, so A dw + B dx = 0 with A = dF/dw and B = dF/dx, and dw/dx = -A^-1 B. An
upper loss sees w* as the output of a `torch.autograd.Function` whose inputs are x. Its backward
receives the cotangent v of w*, which is the upper loss's gradient with respect to w*, and returns
-B^T A^-T v. PyTorch sums the cotangents of all paths before it runs a node. So each problem's
inverse product A^-T v is computed once, however many paths lead to it, and autograd adds direct and
implicit terms. (Engines that differentiate the optimizer's last step have the same form; see
`one_step.py`.)

The backward is written as a differentiable function of its saved tensors: under `create_graph` it
can be differentiated again. A problem in the middle needs this, since its own gradient contains the
response of the one below it.

The solutions, and the engines that differentiate them, are in `solution.py`. Here are the node
`_Response`, one call of its backward pass (a `Pullback`), and the engines behind such a node.

`total_gradient` (in the file of its name) puts them together. To follow one gradient, begin there.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from operator import is_
from typing import Any, cast

import torch
from torch import Tensor

from mlo.errors import EngineError, ProblemError
from mlo.gradient_sums import check_dense
from mlo.once import SharedResults
from mlo.problem import Tensors
from mlo.records import SolveReport
from mlo.replays import check_replay
from mlo.restart import Start
from mlo.solution import (
    COMPARES_EVALUATIONS,
    AbstractEngine,
    Reading,
    Residual,
    Solution,
    Stationary,
    Stepped,
)

__all__ = [
    "IS_NONE",
    "Cotangent",
    "Pullback",
    "PullbackEngine",
    "alias",
    "pulled_back",
]

Cotangent = Sequence[Tensor | None]
"""v, one tensor per parameter; None where nothing above reads that parameter."""

IS_NONE = partial(is_, None)


class PullbackEngine(AbstractEngine):
    """An engine whose response is one node of the autograd graph, with `pullback` behind it."""

    def respond(self, solution: Solution, reading: Reading) -> Tensors:
        """Returns the outputs of a node; its inputs are everything that the solution depends on."""
        assert isinstance(solution, (Stationary, Stepped))
        if reading.in_graph:
            found = self.operations(solution, reading)
            if found is not None:
                return found
        inputs = reading.inputs_of(solution)
        return dict(zip(solution.value, _Response.apply(solution, reading, *inputs), strict=True))

    def operations(self, solution: Stationary | Stepped, reading: Reading) -> Tensors | None:
        """The response as plain operations instead of a node; None: there is only the node.

        It is requested if the response is differentiated again.
        """
        return None

    @abstractmethod
    def pullback(
        self, call: Pullback, cotangent: Cotangent
    ) -> tuple[list[Tensor | None], SolveReport]:
        """Returns the cotangents of the response's inputs, (dθ*/dx)ᵀ v, and how the solve went.

        Args:
            call: the solution, and a way to re-evaluate its problem's loss.
            cotangent: v, one tensor per parameter; None where nothing reads that parameter.
        """


class _Response(torch.autograd.Function):
    """Forward: the current parameters. Backward: the product with the response's Jacobian."""

    @staticmethod
    def forward(
        ctx: Any, solution: Stationary | Stepped, reading: Reading, *inputs: Tensor
    ) -> tuple[Tensor, ...]:
        outputs = tuple(solution.constants().values())
        ctx.solution, ctx.reading = solution, reading
        # A cotangent of None tells an engine that nothing reads the parameter.
        ctx.set_materialize_grads(False)
        # Autograd saves them, so that a second derivative flows through them.
        ctx.save_for_backward(*outputs, *inputs)
        return outputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        grads = pulled_back(
            ctx.solution,
            ctx.reading,
            saved[: len(cotangents)],
            saved[len(cotangents) :],
            wanted=ctx.needs_input_grad[2:],  # after `solution` and `reading`
            # PyTorch enables gradients in a backward pass under create_graph only.
            differentiate=torch.is_grad_enabled(),
            cotangents=cotangents,
        )
        return (None, None, *grads)


def pulled_back(
    solution: Stationary | Stepped,
    reading: Reading,
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    *,
    wanted: Sequence[bool],
    differentiate: bool,
    cotangents: Cotangent,
) -> Sequence[Tensor | None]:
    """The cotangents of a response's inputs, (dθ*/dx)ᵀ v: what its node gives in a backward pass.

    Args:
        solution: whose response.
        reading: of the loss whose gradient is taken.
        outputs: the tensors that stand for the solution.
        inputs: those that it depends on, flat.
        wanted: for each input whether its cotangent is asked for.
        differentiate: whether it is differentiated again.
        cotangents: v.
    """
    # (Checked where the node is created; `isinstance` on an ABC is slow.)
    engine = cast(PullbackEngine, solution.engine)
    _check_serves(engine, solution, differentiate=differentiate)
    if not any(wanted) or all(map(IS_NONE, cotangents)):
        return (None,) * len(wanted)
    # What the engine re-evaluates stays open until it has taken all its products.
    with ExitStack() as stack:
        call = Pullback(
            solution=solution,
            outputs=outputs,
            inputs=inputs,
            wanted=wanted,
            differentiate=differentiate,
            reading=reading,
            stack=stack,
        )
        call.check_repeats()
        grads, report = engine.pullback(call, cotangents)
    check_dense(solution.name, grads)  # an embedding may be read from above
    reading.note(report)
    return grads


def _check_serves(
    engine: AbstractEngine, solution: Stationary | Stepped, *, differentiate: bool
) -> None:
    """Refuses an engine that cannot differentiate this solution, or not twice."""
    advice = solution.evaluation.loss.advice
    if differentiate and not engine.differentiable:
        raise EngineError(
            f"The response of problem {solution.name!r} is differentiated twice, but its engine "
            f"{engine.label!r} cannot be. Give it an engine with autograd products"
            f"{advice.phrase(', such as {}', 'one_step', 'direct')}."
        )
    if solution.residual is not None and not engine.takes_residuals:
        raise EngineError(
            f"The solution of problem {solution.name!r} is defined by a condition other than a "
            f"vanishing gradient of its loss, and {engine.label!r} does not differentiate such a "
            "condition. Use an engine with autograd products"
            f"{advice.phrase(', such as {}', 'gmres')}."
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Pullback:
    """One call of a response's backward pass, and a way to re-evaluate the loss in it.

    Partial derivatives are taken with respect to fresh aliases of the saved tensors, so that a
    product of one argument does not flow into another that depends on it.

    Attributes:
        solution: whose response.
        outputs: the saved outputs, which stand for the solution.
        inputs: the saved inputs, flat, in the order of `solution.evaluation.free_inputs`.
        wanted: for each input whether its gradient is asked for.
        differentiate: whether the pullback must itself be differentiable.
        reading: of the loss whose gradient is taken.
        stack: keeps re-evaluations open whose backward passes run until the pullback ends.
    """

    solution: Stationary | Stepped
    outputs: Sequence[Tensor]
    inputs: Sequence[Tensor]
    wanted: Sequence[bool]
    differentiate: bool
    reading: Reading
    stack: ExitStack

    @property
    def start(self) -> Start | None:
        """Where the differentiated step started, if from a value from above."""
        return self.solution.start

    def source(self, inputs: Sequence[Tensor]) -> dict[str, tuple[int, Tensor]]:
        """By parameter of the problem that a step started from: its place in `inputs`, and it."""
        start, evaluation = self.start, self.solution.evaluation
        place = 0
        for item in evaluation.free_inputs:
            if item.solution is None:
                values = evaluation.values[item.name]
                if start is not None and item.name == start.problem:
                    return {key: (place + k, inputs[place + k]) for k, key in enumerate(values)}
                place += len(values)
            else:
                place += len(item.solution.value)
        return {}

    def parameter_aliases(self, inputs: Sequence[Tensor] = ()) -> Tensors:
        """The point at which the derivative is taken, as tensors that require gradients.

        A step is differentiated at the parameters before it, which are constants; a stationary
        solution at itself, through which a second derivative flows.

        Args:
            inputs: tensors that stand for the inputs. If the step began at the value of one, the
                parameters are functions of it.
        """
        parameters = self.solution.evaluation.parameters
        if self.start is not None and inputs:
            source = {key: tensor for key, (_, tensor) in self.source(inputs).items()}
            with torch.enable_grad():
                linked = self.start.linked(parameters, source)
            return {k: t if t.requires_grad else t.requires_grad_() for k, t in linked.items()}
        # Views of the saved outputs: new tensors to differentiate with respect to, with the
        # outputs' graph.
        if self.differentiate and isinstance(self.solution, Stationary):
            pairs = zip(parameters, self.outputs, strict=True)
            return {key: output.view_as(output) for key, output in pairs}
        return {key: value.detach().requires_grad_() for key, value in parameters.items()}

    def input_aliases(self) -> list[Tensor]:
        """The inputs at the values that they had in the evaluation, differentiable where wanted."""
        evaluation = self.solution.evaluation
        recorded: list[Tensor | None] = []
        # A value may have moved since, so its recorded one is used. A response has not: the saved
        # tensor is at hand.
        for item in evaluation.free_inputs:
            if item.solution is not None:
                recorded += [None] * len(item.solution.value)
            else:
                recorded += evaluation.values[item.name].values()
        found = []
        for saved, value, wanted in zip(self.inputs, recorded, self.wanted, strict=True):
            at = saved if value is None else value
            found.append(alias(saved, at, differentiate=self.differentiate, wanted=wanted))
        return found

    def check_repeats(self) -> None:
        """Warns, once per problem, of a loss that has another value when it is evaluated again.

        Derivatives are taken of repeated evaluations, under the same noise and buffers. State that
        a loss keeps, or random numbers that are not replayed, would be missing. Looked at in
        pullbacks 1, 2, 4, 8, …, since a loss may begin to keep state at any time.
        """
        evaluation, graph = self.solution.evaluation, self.solution.graph
        checks = evaluation.loss.checks
        if not checks.is_due("repeats"):
            return
        if graph is not None and graph.gradients is not None and not self.differentiate:
            return  # a kept graph is differentiated as it is
        parameters = {k: t.detach().requires_grad_() for k, t in evaluation.parameters.items()}
        recorded: list[Tensor] = []  # (`zeroth_order` displaces its inputs)
        for item in evaluation.free_inputs:
            read = evaluation.values[item.name] if item.solution is None else item.solution.value
            recorded += read.values()
        inputs = [
            value.detach().requires_grad_(seen.requires_grad)
            for value, seen in zip(recorded, self.input_aliases(), strict=True)
        ]

        def again() -> dict[str, Tensor]:
            # (A loss may take gradients itself, as a gradient penalty does.)
            with torch.enable_grad(), self.losses(parameters, inputs) as losses:
                return {player: value.detach() for player, value in losses.items()}

        name = evaluation.loss.problem.name
        if not check_replay(name, evaluation.value, again, evaluation.dtypes):
            checks.dismiss(*COMPARES_EVALUATIONS)

    def moved(self, parameters: Tensors, inputs: Sequence[Tensor], stack: ExitStack) -> Pullback:
        """The same call on the same batches, at another point.

        Args:
            parameters: own parameters there.
            inputs: what the solution depends on there, flat.
            stack: keeps re-evaluations open.
        """
        evaluation = self.solution.evaluation
        values, rest = dict(evaluation.values), iter(inputs)
        for item in evaluation.free_inputs:
            if item.solution is None:
                values[item.name] = dict(zip(values[item.name], rest, strict=False))
            else:
                for _ in item.solution.value:
                    next(rest)
        there = replace(evaluation, parameters=parameters, values=values)
        solution = replace(self.solution, evaluation=there, graph=None)
        return replace(self, solution=solution, inputs=inputs, stack=stack)

    def select(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """The tensors, among those that stand for the inputs, whose gradient is requested."""
        return [tensor for tensor, want in zip(inputs, self.wanted, strict=True) if want]

    def check_step(self, after: Tensors, made: Tensors | None = None) -> None:
        """Refuses a step that ends elsewhere when it is repeated.

        Args:
            after: the parameters after it.
            made: those when it was made; None: the solution's.

        Raises:
            ProblemError: if they differ: `settings` or `after_step` does not depend on its
                arguments only.
        """
        made = self.solution.value if made is None else made
        for name, tensor in after.items():
            expected = made[name].detach()
            rounding = torch.finfo(expected.dtype).eps ** 0.5 * (expected.norm() + 1.0)
            if not bool((tensor.detach() - expected).norm() <= rounding):
                raise ProblemError(
                    f"Problem {self.solution.name!r}: its after_step or settings gives {name!r} a "
                    "different value when it is called again at the same point. It keeps state "
                    "between calls or draws random numbers. Make it a function of its arguments."
                )

    def scatter(self, found: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Puts one entry per wanted input into the order of all inputs, None for the others."""
        entries = iter(found)
        return [next(entries) if want else None for want in self.wanted]

    def losses(
        self,
        parameters: Tensors,
        inputs: Sequence[Tensor],
        *,
        players: Collection[str] | None = None,
        shared: SharedResults | None = None,
    ) -> AbstractContextManager[dict[str, Tensor]]:
        """Re-evaluates the problem's loss at `parameters` and `inputs`; yields player → scalar.

        Responses that depend on this problem are made again inside, so the loss is the *total* one.
        The gradients must be taken inside the context.

        Args:
            parameters: own parameters.
            inputs: tensors that stand for the inputs, flat.
            players: as in `Evaluation.losses`.
            shared: as in `Evaluation.losses`.
        """
        evaluation = self.solution.evaluation
        if evaluation.dependent:
            return self._losses_with_responses(parameters, inputs, players=players, shared=shared)
        inner = self._inner(parameters, inputs, in_graph=True)
        reads = {}
        for name in evaluation.loss.reads:
            reads[name] = inner.tensors(name)
        return evaluation.losses(parameters, reads, players=players, shared=shared)

    def displaced_losses(
        self, parameters: Tensors, inputs: Sequence[Tensor]
    ) -> Callable[[Callable[[Tensor], Tensor]], AbstractContextManager[dict[str, Tensor]]]:
        """A function that evaluates the loss as `losses` does, where each tensor is displaced."""
        return lambda displaced: self.losses(
            {key: displaced(tensor) for key, tensor in parameters.items()},
            list(map(displaced, inputs)),
        )

    @contextmanager
    def _losses_with_responses(
        self,
        parameters: Tensors,
        inputs: Sequence[Tensor],
        *,
        players: Collection[str] | None,
        shared: SharedResults | None,
    ) -> Iterator[dict[str, Tensor]]:
        """As `losses`, if the loss reads responses to this problem, which are made again inside."""
        with (
            self.reads_at(parameters, inputs, in_graph=True) as reads,
            self.solution.evaluation.losses(
                parameters, reads, players=players, shared=shared
            ) as losses,
        ):
            yield losses

    @property
    def residual(self) -> Residual | None:
        """F of the solution, where it is not the gradient of the problem's loss."""
        return self.solution.residual

    @contextmanager
    def residuals(self, parameters: Tensors, inputs: Sequence[Tensor]) -> Iterator[Tensors]:
        """Evaluates F, unless it is a loss's gradient, as `losses` does a loss; by parameter."""
        residual, evaluation = self.residual, self.solution.evaluation
        assert residual is not None
        with (
            self.reads_at(parameters, inputs) as reads,
            residual(evaluation, parameters, reads) as found,
        ):
            yield found

    @contextmanager
    def reads_at(
        self, parameters: Tensors, inputs: Sequence[Tensor], *, in_graph: bool = False
    ) -> Iterator[dict[str, Tensors]]:
        """Yields problem → tensors for all that the problem reads (see `reading_at`)."""
        with self.reading_at(parameters, inputs, in_graph=in_graph) as inner:
            yield {name: inner.tensors(name) for name in self.solution.evaluation.loss.reads}

    @contextmanager
    def reading_at(
        self, parameters: Tensors, inputs: Sequence[Tensor], *, in_graph: bool = False
    ) -> Iterator[Reading]:
        """Yields what represents the problems that the loss sees, at `parameters` and `inputs`.

        Args:
            parameters: own parameters, on which responses below may depend.
            inputs: tensors that stand for the inputs, flat.
            in_graph: as in `Reading`.
        """
        inner = self._inner(parameters, inputs, in_graph=in_graph)
        try:
            yield inner
        finally:
            inner.responses.clear()  # as in `total_gradient`: a cycle that nothing would free

    def _inner(self, parameters: Tensors, inputs: Sequence[Tensor], *, in_graph: bool) -> Reading:
        """What `reading_at` yields."""
        evaluation = self.solution.evaluation
        values: dict[str, Tensors] = {self.solution.name: parameters}
        responses: dict[int, Tensors] = {}
        rest = iter(inputs)  # each `zip` below takes from it as many as the item has tensors
        for item in evaluation.free_inputs:
            solution = item.solution
            if solution is None:
                values[item.name] = dict(zip(evaluation.values[item.name], rest, strict=False))
            else:
                responses[id(solution)] = dict(zip(solution.value, rest, strict=False))
        # The inputs are given; what depends on this problem is resolved again, from `parameters`.
        return Reading(
            values=values,
            solutions=evaluation.solutions,
            responses=responses,
            reports=self.reading.reports,
            in_graph=in_graph,
            reader=f"{self.reading.reader}/{self.solution.name}",
            held_constant=self.reading.held_constant,
        )


def alias(saved: Tensor, recorded: Tensor, *, differentiate: bool, wanted: bool = True) -> Tensor:
    """Returns a tensor of the value `recorded` to differentiate by, linked to `saved` on request.

    Args:
        saved: the tensor of the graph.
        recorded: the value at which the loss was evaluated; `saved` may have moved since.
        differentiate: whether the derivative that is taken is itself differentiated, and so must
            flow into `saved`.
        wanted: whether a derivative in it is asked for at all.
    """
    if not differentiate or not saved.requires_grad:
        return recorded.detach().requires_grad_(wanted)
    if recorded.data_ptr() == saved.data_ptr():
        return saved.view_as(saved)
    # The value of `recorded` with the derivative of `saved`: the bracket is zero.
    return recorded + (saved - saved.detach())
