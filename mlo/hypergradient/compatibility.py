"""Checks that the chosen engines can serve a graph, before the first step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mlo.errors import EngineError, warn_user
from mlo.graph import DependencyGraph
from mlo.hypergradient.base import Engine
from mlo.hypergradient.optimizer_step import has_decoupled_decay, has_differentiable_step
from mlo.sharding import is_sharded

__all__ = ["check_engines", "check_kept_graphs", "check_look_ahead", "check_sharding"]


def check_engines(graph: DependencyGraph, engines: Mapping[str, Engine]) -> None:
    """Refuses an engine that cannot differentiate the response it is chosen for.

    Raises:
        EngineError: naming the problem, the reason and an engine that can.
    """
    read = {lower for name in graph.problems for lower in graph.responses(name)}
    for name in read:
        engine, problem = engines[name], graph.problems[name]
        if engine.drops_implicit_term:
            continue
        if problem.compile and engine.products.differentiable:
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
        plain = [o for o in problem.optimizers.values() if not has_differentiable_step(o)]
        if engine.differentiates_step and plain:
            raise EngineError(
                f"Problem {name!r}: its optimizer {type(plain[0]).__name__} has no differentiable "
                f"step (an option `differentiable` like torch.optim's), which {engine.label!r} "
                "needs. Use a torch.optim optimizer, or an engine that does not differentiate the "
                "step, such as 'neumann' or 'cg'."
            )
        if engine.recorded_steps > 1 and len(problem.moves) > 1:
            raise EngineError(
                f"Problem {name!r} has player_steps: {engine.label!r} would need the moves of "
                "single players between the steps that it records. Use 'one_step' or an engine "
                "that does not differentiate steps."
            )
        if engine.inverts and not engine.products.differentiable:
            warn_user(
                f"Problem {name!r}: the engine {engine.label!r} solves with finite differences, "
                "whose errors a solver amplifies; across the kinks of ReLU or max-pooling they are "
                "wrong at any step size. Prefer products='autograd' where the loss has a second "
                "derivative."
            )
        if not engine.differentiates_step and has_decoupled_decay(problem):
            warn_user(
                f"Problem {name!r}: decoupled weight decay (AdamW) is not the gradient of a "
                f"penalty, so the engine {engine.label!r} leaves it out of the stationarity "
                "condition. 'one_step' differentiates it exactly."
            )
        _check_inner_responses(graph, engines, name)


def check_kept_graphs(
    graph: DependencyGraph, engines: Mapping[str, Engine], *, divided: bool
) -> None:
    """Refuses engines that keep the graph of a gradient which is made of several.

    Args:
        graph: the problems.
        engines: problem → engine.
        divided: whether processes average the gradients.

    Raises:
        EngineError: naming the problem.
    """
    for name in {lower for reader in graph.problems for lower in graph.responses(reader)}:
        if not engines[name].keeps_graph:
            continue
        why = ""
        if any(not engines[inner].drops_implicit_term for inner in graph.dependent(name)):
            why = "contains the response of another problem"
        elif graph.problems[name].accumulate > 1:
            why = "is averaged over several batches"
        elif divided:
            why = "is averaged over processes"
        if why:
            raise EngineError(
                f"Problem {name!r} has a gradient that {why}, whose graph cannot be kept. Give "
                f"{name!r} the engine 'one_step' without keep_graph."
            )


def _check_inner_responses(
    graph: DependencyGraph, engines: Mapping[str, Engine], name: str
) -> None:
    """A problem whose own gradient contains a response needs that response to be differentiable
    again.
    """
    for inner in graph.responses(name):
        if engines[inner].drops_implicit_term or inner not in graph.dependent(name):
            continue
        if not engines[name].products.differentiable:
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


def check_look_ahead(
    graph: DependencyGraph, engines: Mapping[str, Engine], looking: Iterable[str]
) -> None:
    """Refuses engines of several recorded steps where problems look ahead, which they do by one
    step.

    Raises:
        EngineError: naming the problem.
    """
    for name in looking:
        for lower in graph.responses(name):
            if engines[lower].recorded_steps > 1:
                raise EngineError(
                    f"Problem {name!r} moves first in a round and looks one step ahead at the "
                    f"solution of {lower!r}, of which {engines[lower].label!r} needs several. Use "
                    "'one_step', or order='lower_first'."
                )


def check_sharding(graph: DependencyGraph, engines: Mapping[str, Engine], *, exact: bool) -> None:
    """Refuses what sharded parameters (DTensors) cannot serve.

    Args:
        graph: the problems.
        engines: problem → engine.
        exact: whether the optimizer is data-parallel and averages every evaluation.

    Raises:
        EngineError: naming the problem and what to do.
    """
    read = {lower for name in graph.problems for lower in graph.responses(name)}
    for name, problem in graph.problems.items():
        if not any(is_sharded(parameter) for parameter in problem.parameters.values()):
            continue
        if not exact:
            raise EngineError(
                f"Problem {name!r} has sharded parameters, whose gradients are averaged as they "
                "are scattered. Pass distributed='exact'."
            )
        if problem.grad_clip is not None:
            raise EngineError(
                f"Problem {name!r} has sharded parameters, which grad_clip does not serve. Drop it."
            )
        engine = engines[name]
        if name in read and engine.name.startswith("betty-"):
            raise EngineError(
                f"Problem {name!r} has sharded parameters, which Betty's functions do not take. "
                f"Use another engine than {engine.label!r}."
            )
        nested = {
            problem
            for middle in read
            for inner in graph.responses(middle)
            if inner in graph.dependent(middle) and not engines[inner].drops_implicit_term
            for problem in (middle, inner)
        }
        if name in nested:
            raise EngineError(
                f"Problem {name!r} has sharded parameters, and its response is differentiated "
                "twice (a gradient within a gradient), for which they must be whole."
            )
