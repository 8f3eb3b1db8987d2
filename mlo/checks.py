"""Checks that engines can serve a graph, before the first step, and losses, on a first batch."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial

from torch import Tensor

from mlo.distributed import DataParallel
from mlo.errors import EngineError, ProblemError, warn_user
from mlo.graph import DependencyGraph
from mlo.hypergradient.double_backward import check_checkpointing, check_double_backward
from mlo.hypergradient.first_order import FirstOrder
from mlo.hypergradient.products import Engine
from mlo.loss import Examine
from mlo.optimizer_step import has_decoupled_decay, has_differentiable_step
from mlo.problem import Problem
from mlo.response import AbstractEngine, StepEngine
from mlo.sharding import is_sharded

__all__ = ["LossChecks", "check_engines", "differentiated_problems"]

Engines = Mapping[str, AbstractEngine]


def differentiated_problems(graph: DependencyGraph, engines: Engines) -> frozenset[str]:
    """The problems whose solutions some total gradient differentiates."""
    read: set[str] = set()
    for name in graph.problems:
        read.update(graph.solutions_in[name])
    return frozenset(name for name in read if not isinstance(engines[name], FirstOrder))


# ------------------------------ before the first step


def check_engines(
    graph: DependencyGraph,
    engines: Engines,
    *,
    looks_ahead: Collection[str] = (),
    parallel: DataParallel | None = None,
) -> None:
    """Refuses engines that cannot differentiate the responses they are chosen for.

    Args:
        graph: the problems.
        engines: problem → engine of its solution.
        looks_ahead: the problems that see lower solutions one step ahead.
        parallel: the processes among which batches are divided.

    Raises:
        EngineError: naming the problem, the reason and an engine that can.
    """
    differentiated = differentiated_problems(graph, engines)
    for name in graph.problems:
        if name in differentiated:
            engine, problem = engines[name], graph.problems[name]
            _check_problem(problem, engine)
            _warn_of_inexact(problem, engine)
            _check_inner_responses(graph, engines, name)
            _check_kept_graph(graph, engines, name, parallel)
        _check_sharding(graph, engines, name, parallel)
    _check_look_ahead(graph, engines, looks_ahead)


def _check_problem(problem: Problem, engine: AbstractEngine) -> None:
    """Whether the engine fits what the problem is."""
    name = problem.name
    if problem.compile and engine.uses_second_derivatives:
        raise EngineError(
            f"Problem {name!r} is compiled, and compiled modules have no double backward, "
            f"which the engine {engine.label!r} needs. Use 'darts' or another engine with "
            "finite_difference products, or compile=False."
        )
    if engine.needs_symmetry and len(problem.players) > 1:
        raise EngineError(
            f"Problem {name!r} is a game, whose Jacobian is not symmetric, which "
            f"{engine.label!r} needs. Use 'gmres', 'one_step' or, where the eigenvalues of the "
            "Jacobian have positive real parts, 'neumann'."
        )
    if not isinstance(engine, StepEngine):
        return
    plain = [o for o in problem.optimizers.values() if not has_differentiable_step(o)]
    if plain:
        raise EngineError(
            f"Problem {name!r}: its optimizer {type(plain[0]).__name__} has no differentiable "
            f"step (an option `differentiable` like torch.optim's), which {engine.label!r} "
            "needs. Use a torch.optim optimizer, or an engine that does not differentiate the "
            "step, such as 'neumann' or 'cg'."
        )
    if engine.recorded_steps > 1 and len(problem.player_moves) > 1:
        raise EngineError(
            f"Problem {name!r} has player_steps: {engine.label!r} would need the moves of "
            "single players between the steps that it records. Use 'one_step' or an engine "
            "that does not differentiate steps."
        )


def _warn_of_inexact(problem: Problem, engine: AbstractEngine) -> None:
    """Says what the engine will not see, where it computes something all the same."""
    inverts = isinstance(engine, Engine) and engine.inverts
    if inverts and not engine.uses_second_derivatives:
        warn_user(
            f"Problem {problem.name!r}: the engine {engine.label!r} solves with finite "
            "differences, whose errors a solver amplifies; across the kinks of ReLU or max-pooling "
            "they are wrong at any step size. Prefer products='autograd' where the loss has a "
            "second derivative."
        )
    if not isinstance(engine, StepEngine) and has_decoupled_decay(problem):
        warn_user(
            f"Problem {problem.name!r}: decoupled weight decay (AdamW) is not the gradient of a "
            f"penalty, so the engine {engine.label!r} leaves it out of the stationarity condition. "
            "'one_step' differentiates it exactly."
        )


def _check_inner_responses(graph: DependencyGraph, engines: Engines, name: str) -> None:
    """A problem whose own gradient contains a response needs to differentiate that again."""
    for inner in _inner_responses(graph, engines, name):
        if not engines[name].uses_second_derivatives:
            raise EngineError(
                f"The gradient of problem {name!r} contains the response of {inner!r}, which a "
                f"finite difference in {name!r} would hold fixed. Give {name!r} an engine with "
                "autograd products, such as 'one_step' or 'direct', instead of "
                f"{engines[name].label!r}."
            )
        if not engines[inner].differentiable:
            raise EngineError(
                f"Problem {name!r} is itself a lower problem and its gradient contains the "
                f"response of {inner!r}, so that response is differentiated twice, which "
                f"{engines[inner].label!r} cannot be. Give {inner!r} an engine with autograd "
                "products, such as 'one_step' or 'direct'."
            )


def _inner_responses(graph: DependencyGraph, engines: Engines, name: str) -> Iterator[str]:
    """The problems whose responses the problem's own gradient contains."""
    for inner in graph.solutions_in[name]:
        dependent = inner in graph.solutions_depending_on[name]
        if dependent and not isinstance(engines[inner], FirstOrder):
            yield inner


def _check_kept_graph(
    graph: DependencyGraph, engines: Engines, name: str, parallel: DataParallel | None
) -> None:
    """An engine cannot keep the graph of a gradient that is made of several."""
    engine = engines[name]
    if not isinstance(engine, StepEngine) or not engine.keeps_graph:
        return
    why = ""
    if any(_inner_responses(graph, engines, name)):
        why = "contains the response of another problem"
    elif graph.problems[name].accumulate > 1:
        why = "is averaged over several batches"
    elif parallel is not None:
        why = "is averaged over processes"
    if why:
        raise EngineError(
            f"Problem {name!r} has a gradient that {why}, whose graph cannot be kept. Give "
            f"{name!r} the engine 'one_step' without keep_graph."
        )


def _check_look_ahead(
    graph: DependencyGraph, engines: Engines, looks_ahead: Collection[str]
) -> None:
    """Problems look ahead by one step, where an engine of several recorded steps needs more."""
    for name in looks_ahead:
        for lower in graph.solutions_in[name]:
            engine = engines[lower]
            if isinstance(engine, StepEngine) and engine.recorded_steps > 1:
                raise EngineError(
                    f"Problem {name!r} moves first in a round and looks one step ahead at the "
                    f"solution of {lower!r}, of which {engine.label!r} needs several. Use "
                    "'one_step', or order='lower_first'."
                )


def _check_sharding(
    graph: DependencyGraph, engines: Engines, name: str, parallel: DataParallel | None
) -> None:
    """What sharded parameters (DTensors) cannot serve."""
    problem, engine = graph.problems[name], engines[name]
    if not any(is_sharded(parameter) for parameter in problem.parameters.values()):
        return
    if parallel is None or not parallel.exact:
        raise EngineError(
            f"Problem {name!r} has sharded parameters, whose gradients are averaged as they "
            "are scattered. Pass distributed='exact'."
        )
    if problem.grad_clip is not None:
        raise EngineError(
            f"Problem {name!r} has sharded parameters, which grad_clip does not serve. Drop it."
        )
    differentiated = differentiated_problems(graph, engines)
    if name in differentiated and not engine.takes_sharded:
        raise EngineError(
            f"Problem {name!r} has sharded parameters, which Betty's functions do not take. "
            f"Use another engine than {engine.label!r}."
        )
    for middle in differentiated:
        inner = set(_inner_responses(graph, engines, middle))
        if inner and (name == middle or name in inner):
            raise EngineError(
                f"Problem {name!r} has sharded parameters, and its response is differentiated "
                "twice (a gradient within a gradient), for which they must be whole."
            )


# ------------------------------ on the first batch


class LossChecks:
    """Refuses losses, on their first batch, that cannot give what is needed of them.

    Args:
        graph: the problems.
        engines: problem → engine of its solution.

    Attributes:
        pending: problem → what is still to be shown a first batch; an entry is removed once all of
            the problem's players were looked at.
    """

    def __init__(self, graph: DependencyGraph, engines: Engines) -> None:
        self._graph, self._engines = graph, engines
        differentiated = differentiated_problems(graph, engines)
        twice = {name for name in differentiated if engines[name].uses_second_derivatives}
        self.pending: dict[str, Examine] = {
            name: partial(_examine, name, name in twice) for name in graph.problems
        }
        self._warned: set[str] = set()

    def explain_zero(self, name: str, resting: Collection[str]) -> None:
        """Says why a loss has no derivative in any parameter.

        Args:
            name: the problem.
            resting: the problems that do not move in this round.

        Raises:
            ProblemError: if the loss is cut off from all parameters.
        """
        earlier = list(self._graph.problems)[: self._graph.position[name]]
        dropped = [other for other in earlier if isinstance(self._engines[other], FirstOrder)]
        still = [other for other in earlier if other in resting]
        if not dropped and not still:
            raise ProblemError(
                f"The loss of problem {name!r} does not depend on any parameter: it was detached, "
                "computed under torch.no_grad(), or reads none."
            )
        if name not in self._warned:
            self._warned.add(name)
            cause = f"warm-up of {', '.join(still)}"
            if dropped:
                cause = f"'first_order' of {', '.join(dropped)}"
            warn_user(
                f"The gradient of problem {name!r} is zero: its loss depends only on the solutions "
                f"of other problems, and the {cause} drops their derivative. Choose an engine that "
                "keeps it, such as 'one_step'."
            )


def _examine(name: str, twice: bool, loss: Tensor, parameters: Sequence[Tensor]) -> None:
    """Looks at a loss whose gradient is differentiated `twice`, or once."""
    check_checkpointing(name, loss)
    if twice:
        check_double_backward(name, loss, parameters)
