"""Checks that engines can serve a graph (before the first step) and losses (on a first batch)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mlo.advice import EXACT, SOBA_FIRST, WITHOUT_STEPS, EngineAdvice
from mlo.check_schedule import CheckSchedule
from mlo.distributed import DataParallel
from mlo.errors import EngineError, GraphError, ProblemError, warn_user
from mlo.gradient_paths import (
    Engines,
    differentiated_problems,
    differentiated_starts,
    inner_responses,
    readers_of_response,
    why_graph_cannot_be_kept,
)
from mlo.graph import DependencyGraph
from mlo.hypergradient.direct import Direct
from mlo.hypergradient.double_backward import (
    check_checkpointing,
    check_double_backward,
    check_silent_operations,
    is_about_third_derivative,
    leaves_of,
    no_third_derivative,
)
from mlo.hypergradient.first_order import FirstOrder
from mlo.hypergradient.identity import Identity
from mlo.hypergradient.one_step import OneStep
from mlo.hypergradient.products import Engine
from mlo.hypergradient.registry import engine_from
from mlo.loss import Examine, gradients
from mlo.optimizer_step import (
    OptimizerStep,
    acts_around_step,
    check_settings,
    decays_outside_gradient,
    has_differentiable_step,
    is_foreign,
)
from mlo.problem import Problem, Tensors
from mlo.response import AbstractEngine, Evaluation, Stationary, StepEngine, Stepped
from mlo.restart import Start, starts_of
from mlo.sharding import is_sharded
from mlo.tensors import in_precision, real_inner

__all__ = [
    "LossChecks",
    "StepChecks",
    "check_engines",
    "check_restarts",
    "check_schedulers",
    "engine_advice",
    "explain_third_derivative",
]

# ------------------------------ before the first step


def check_engines(
    graph: DependencyGraph,
    engines: Engines,
    *,
    looks_ahead: Collection[str] = (),
    parallel: DataParallel | None = None,
    simultaneous: bool = False,
) -> None:
    """Refuses engines that cannot differentiate the responses they are chosen for.

    Args:
        graph: the problems.
        engines: problem → engine of its solution.
        looks_ahead: the problems that see lower solutions one step ahead.
        parallel: the processes among which batches are divided.
        simultaneous: whether all gradients of a round are taken where it begins.

    Raises:
        EngineError: naming the problem, the reason and an engine that can.
        GraphError: where a problem does not fit a simultaneous round.
    """
    differentiated = differentiated_problems(graph, engines)
    advices = {
        name: engine_advice(
            graph,
            engines,
            name,
            looks_ahead=looks_ahead,
            parallel=parallel,
            simultaneous=simultaneous,
        )
        for name in graph.problems
    }
    for name, problem in graph.problems.items():
        advice = advices[name]
        _check_parameters(problem)
        if name in differentiated:
            _check_differentiated(graph, engines, name, parallel, advice)
            _warn_of_inexact(problem, engines[name], advice)
        _check_sharding(graph, engines, name, parallel)
        _check_estimator(graph, engines, name, parallel, advice)
    _check_look_ahead(graph, engines, looks_ahead)
    _warn_of_common_windows(graph, engines, differentiated)
    if simultaneous:
        _check_simultaneous(graph, engines, differentiated, advices)


def _check_differentiated(
    graph: DependencyGraph,
    engines: Engines,
    name: str,
    parallel: DataParallel | None,
    advice: EngineAdvice,
) -> None:
    """Refuses the engine of a problem whose solution is differentiated."""
    problem, engine = graph.problems[name], engines[name]
    _check_problem(problem, engine, advice)
    _check_inner_responses(graph, engines, name, advice)
    _check_kept_graph(graph, engines, name, parallel)
    if problem.accumulate_solves > 1:
        raise EngineError(
            f"Problem {name!r} moves by the mean of its gradients over "
            f"{problem.accumulate_solves} solves of the problems below it, but only the "
            f"last is available when {engine.label!r} differentiates its solution. Drop "
            f"accumulate_solves=, solve all tasks in one problem, or give {name!r} the "
            "engine 'first_order'."
        )


def engine_advice(
    graph: DependencyGraph,
    engines: Engines,
    name: str,
    *,
    looks_ahead: Collection[str] = (),
    parallel: DataParallel | None = None,
    simultaneous: bool = False,
) -> EngineAdvice:
    """What messages on a problem may advise: engines that would be accepted instead of its own.

    Args:
        graph: the problems.
        engines: problem → engine of its solution.
        name: the problem.
        looks_ahead: the problems that see lower solutions one step ahead.
        parallel: the processes among which batches are divided.
        simultaneous: whether all gradients of a round are taken where it begins.
    """

    def serves(choice: str) -> bool:
        # The engines of other problems may be at fault too. So only the checks that look at this
        # problem's engine are made: its own, and those of problems that contain its response.
        others = {**engines, name: engine_from(choice)}
        starts = starts_of(graph.problems)
        try:
            for other in (name, *readers_of_response(graph, others, name)):
                _check_differentiated(graph, others, other, parallel, advice)
                _check_estimator(graph, others, other, parallel, advice)
            _check_sharding(graph, others, name, parallel)
            _check_look_ahead(graph, others, looks_ahead, lower=name)
            if name in starts:
                check_restarts(graph, others, {name: starts[name]}, looks_ahead=looks_ahead)
        except (EngineError, ProblemError):
            return False
        engine, problem = others[name], graph.problems[name]
        if isinstance(engine, Direct) and problem.size > engine.max_parameters:
            return False
        return not (simultaneous and isinstance(engine, StepEngine))

    advice = EngineAdvice(
        serves=serves,
        find_third=lambda: _third_derivative(graph, engines, name, advice),
        find_other=partial(
            engine_advice,
            graph,
            engines,
            looks_ahead=looks_ahead,
            parallel=parallel,
            simultaneous=simultaneous,
        ),
    )
    return advice


def _third_derivative(
    graph: DependencyGraph, engines: Engines, name: str, advice: EngineAdvice
) -> str:
    """What takes third derivatives of a problem's loss, in words; empty if nothing does.

    The gradient of a middle problem contains the response of the problem, which has second
    derivatives of its loss. An engine that differentiates this gradient takes the third ones. One
    that differentiates it in what is read from above, and not in the middle problem itself, needs
    them only if the loss reads that too.
    """
    if isinstance(engines[name], FirstOrder):
        return ""
    for middle in readers_of_response(graph, engines, name):
        engine, problem = engines[middle], graph.problems[middle]
        above = [read for read in graph.reads[name] if middle in graph.solutions_in[read]]
        without = isinstance(engine, (OneStep, Identity)) and not problem.restart_from
        if above or not without:
            by = f"the engine {engine.label!r} of problem {middle!r}"
            if above or problem.restart_from:
                return by
            return by + advice.on(middle).phrase(" ({} would not)", "one_step")
    return ""


def _check_parameters(problem: Problem) -> None:
    """Refuses hooks that mlo never calls, although the user relies on them."""
    for key, parameter in problem.parameters.items():
        if parameter._post_accumulate_grad_hooks:
            raise ProblemError(
                f"Parameter {key!r} of problem {problem.name!r} has a post-accumulate-grad hook. "
                "It would never be called, since gradients are not accumulated by backward(): use "
                "Problem(before_update=...)."
            )


def _check_problem(problem: Problem, engine: AbstractEngine, advice: EngineAdvice) -> None:
    """Refuses an engine that does not fit what the problem is."""
    name = problem.name
    for optimizer in problem.optimizers.values():
        for group in optimizer.param_groups:
            check_settings(name, group)
    if problem.compile and engine.uses_second_derivatives:
        raise EngineError(
            f"Problem {name!r} is compiled, and compiled modules have no double backward, "
            f"which the engine {engine.label!r} needs. Use compile=False"
            f"{advice.phrase(', or {} or another engine with finite_difference products', 'darts')}"
            "."
        )
    if engine.needs_symmetry and len(problem.players) > 1:
        raise EngineError(
            f"Problem {name!r} is a game, whose Jacobian is not symmetric, but {engine.label!r} "
            f"needs symmetry.{advice.phrase(' Use {}', 'gmres', 'direct', 'one_step')}"
            + advice.phrase(
                "; or, where the eigenvalues of the Jacobian have positive real parts, {}",
                "neumann",
            )
            + "."
        )
    if not isinstance(engine, StepEngine):
        # Of a complex parameter autograd's gradient is conjugated, so A is linear over the real
        # numbers only, and not a matrix to solve with.
        for key, parameter in problem.parameters.items():
            if parameter.is_complex():
                raise EngineError(
                    f"Problem {name!r}: its parameter {key!r} is complex, in which "
                    f"{engine.label!r} would solve wrongly. Keep it as a real tensor of one more "
                    "dimension (torch.view_as_real) and use torch.view_as_complex in the loss"
                    f"{advice.phrase(', or use {}', 'one_step', 'darts', 'unroll')}."
                )
        if problem.settings is not None:
            raise EngineError(
                f"Problem {name!r} has settings=, which act on the steps of its optimizer. "
                f"{engine.label!r} differentiates the condition that the gradient is zero, which "
                f"does not contain them.{advice.phrase(' Use {}.', 'one_step', 'darts', 'unroll')} "
                "To learn a weight decay, you can also write it into the loss."
            )
        if problem.after_step is not None and not engine.takes_residuals:
            raise EngineError(
                f"Problem {name!r} has after_step=, so its solution is a fixed point of projected "
                f"steps, but {engine.label!r} does not differentiate such a point."
                + advice.phrase(" Use {}.", "one_step", "unroll", "cg", "gmres")
            )
        return

    # From here on: engines that differentiate the optimizer's step.
    plain = [o for o in problem.optimizers.values() if not has_differentiable_step(o)]
    if plain:
        raise EngineError(
            f"Problem {name!r}: its optimizer {type(plain[0]).__name__} has no differentiable "
            f"step (no option `differentiable` like torch.optim's), but {engine.label!r} needs "
            "one. Use a torch.optim optimizer, or an engine that does not differentiate the "
            f"step{advice.phrase(', such as {}', *WITHOUT_STEPS)}."
        )
    if isinstance(engine, OneStep) and engine.plain and acts_around_step(problem):
        raise EngineError(
            f"Problem {name!r} has after_step, settings or restart_from, which plain=True of "
            f"{engine.label!r} ignores. Drop plain=True."
        )
    if engine.recorded_steps > 1 and len(problem.player_moves) > 1:
        raise EngineError(
            f"Problem {name!r} has player_steps: {engine.label!r} would need the moves of "
            "single players between the steps that it records."
            + advice.phrase(" Use {}.", "one_step", *WITHOUT_STEPS)
        )


def _warn_of_inexact(problem: Problem, engine: AbstractEngine, advice: EngineAdvice) -> None:
    """Warns of what the engine computes inexactly, or leaves out."""
    inverts = isinstance(engine, Engine) and engine.inverts
    if inverts and not engine.uses_second_derivatives:
        warn_user(
            f"Problem {problem.name!r}: the engine {engine.label!r} solves with finite "
            "differences, whose errors a solver amplifies; across the kinks of ReLU or "
            "max-pooling they are wrong at any step size. Prefer products='autograd' if the loss "
            "has a second derivative."
        )
    if isinstance(engine, StepEngine):
        return
    for optimizer in problem.optimizers.values():
        if problem.after_step is not None and type(optimizer) is not torch.optim.SGD:
            warn_user(
                f"Problem {problem.name!r}: the engine {engine.label!r} assumes that its solution "
                "is a fixed point θ = P(θ − lr ∇L(θ)) with P of after_step. For "
                f"{type(optimizer).__name__} that holds only if P acts on each entry separately "
                "and is the same at every learning rate (nonnegative, box). Use torch.optim.SGD"
                f"{advice.phrase(', or {}', 'one_step', 'unroll')}."
            )
        answers = [decays_outside_gradient(optimizer, group) for group in optimizer.param_groups]
        name = type(optimizer).__name__
        if True in answers:
            warn_user(
                f"Problem {problem.name!r}: decoupled weight decay ({name}) is not the gradient of "
                f"a penalty, so the engine {engine.label!r} leaves it out of the stationarity "
                "condition. Put a penalty into the loss"
                f"{advice.phrase(', or use {}, which is exact for the decay', 'one_step')}."
            )
        elif None in answers:
            warn_user(
                f"Problem {problem.name!r}: whether the weight decay of {name} is the gradient of "
                f"a penalty could not be found out by a trial step, so the engine "
                f"{engine.label!r} treats it as one. If it is decoupled, as AdamW's is, set it to "
                "0 and put a penalty into the loss."
            )


def _warn_of_common_windows(
    graph: DependencyGraph, engines: Engines, differentiated: Collection[str]
) -> None:
    """Warns of one choice of several steps for problems that make more, and others that make fewer.

    To differentiate more steps than a round makes is an online method, which somebody may want. As
    a side effect of what another problem needs it is a mistake.
    """
    few: dict[int, list[str]] = {}
    enough: set[int] = set()
    for name, problem in graph.problems.items():
        engine = engines[name]
        steps = engine.recorded_steps if isinstance(engine, StepEngine) else 0
        if name not in differentiated or steps < 2:
            continue
        if problem.steps >= steps or problem.restart_from is not None:
            enough.add(id(engine))
        else:
            few.setdefault(id(engine), []).append(name)
    for key, names in few.items():
        engine = engines[names[0]]
        if key in enough and isinstance(engine, StepEngine):
            steps = graph.problems[names[0]].steps
            warn_user(
                f"The engine {engine.label!r} differentiates {engine.recorded_steps} steps of "
                f"every problem, but {names[0]!r} makes {steps} of them per move of those above. "
                "Its other steps were made at earlier values of the problems above, and are "
                "differentiated as if at the latest ones. Give each problem its own engine, as in "
                f"hypergradient={{{names[0]!r}: {{'name': {engine.label!r}, 'steps': {steps}}}, "
                "'default': ...}."
            )


def _check_inner_responses(
    graph: DependencyGraph, engines: Engines, name: str, advice: EngineAdvice
) -> None:
    """Refuses engines that cannot differentiate a response inside a problem's own gradient."""
    for inner in inner_responses(graph, engines, name):
        if engines[name].needs_symmetry and inner in graph.problems[name].after_step_reads:
            raise EngineError(
                f"The after_step of problem {name!r} reads {inner!r}, whose solution depends on "
                f"{name!r}. So the system that {engines[name].label!r} solves is not symmetric, "
                f"but it needs symmetry.{advice.phrase(' Use {}.', 'gmres', 'direct', 'neumann')}"
            )
        if not engines[name].uses_second_derivatives:
            raise EngineError(
                f"The gradient of problem {name!r} contains the response of {inner!r}, which a "
                f"finite difference in {name!r} would hold fixed. Give {name!r} an engine with "
                f"autograd products{advice.phrase(', such as {},', *EXACT)} instead of "
                f"{engines[name].label!r}."
            )
        if not engines[inner].differentiable:
            raise EngineError(
                f"Problem {name!r} is itself a lower problem and its gradient contains the "
                f"response of {inner!r}, so that response is differentiated twice, but "
                f"{engines[inner].label!r} does not support that. Give {inner!r} an engine with "
                "autograd products"
                f"{advice.on(inner).phrase(', such as {}', *EXACT)}."
            )


def _check_kept_graph(
    graph: DependencyGraph, engines: Engines, name: str, parallel: DataParallel | None
) -> None:
    """Refuses to keep the graph of a gradient that is a sum of several."""
    engine = engines[name]
    if not isinstance(engine, StepEngine) or engine.keeps_graph is not True:
        return
    why = why_graph_cannot_be_kept(graph, engines, name, parallel)
    if why:
        raise EngineError(
            f"Problem {name!r} has a gradient that {why}, so its graph cannot be kept. Give "
            f"{name!r} the engine 'one_step' without keep_graph."
        )


def _check_look_ahead(
    graph: DependencyGraph,
    engines: Engines,
    looks_ahead: Collection[str],
    *,
    lower: str | None = None,
) -> None:
    """Refuses engines of several recorded steps where a problem looks ahead by one.

    Args:
        graph: the problems.
        engines: problem → engine of its solution.
        looks_ahead: the problems that see lower solutions one step ahead.
        lower: the only solution to look at; None: all.
    """
    for name in looks_ahead:
        for other in graph.solutions_in[name]:
            engine = engines[other]
            if lower not in (None, other) or not isinstance(engine, StepEngine):
                continue
            if engine.recorded_steps > 1:
                raise EngineError(
                    f"Problem {name!r} moves first in a round and looks one step ahead at the "
                    f"solution of {other!r}, but {engine.label!r} needs several steps. Use "
                    "'one_step', or order='lower_first'."
                )


def _check_simultaneous(
    graph: DependencyGraph,
    engines: Engines,
    differentiated: Collection[str],
    advices: Mapping[str, EngineAdvice],
) -> None:
    """Refuses what does not fit a round in which all problems are seen as they were at its start.

    Raises:
        EngineError: for an engine that differentiates a step, because the step is made within the
            round.
        GraphError: where a problem moves twice in a round, or is read by value after it has moved.
    """
    schedule = graph.schedule()
    for name, problem in graph.problems.items():
        if name in differentiated and isinstance(engines[name], StepEngine):
            raise EngineError(
                f"Problem {name!r}: the engine {engines[name].label!r} differentiates the step "
                "made in a round, but in a simultaneous round that step comes too late. Use "
                "order='lower_first', or an implicit engine"
                + advices[name].phrase(", such as {}", *SOBA_FIRST)
                + "."
            )
        if problem.steps > 1:
            raise GraphError(
                f"Problem {name!r} has steps={problem.steps}, but in a simultaneous round each "
                "problem moves once. Use steps=1, or order='lower_first'."
            )
        if problem.accumulate_solves > 1 or problem.restart_from is not None:
            argument = "restart_from" if problem.restart_from is not None else "accumulate_solves"
            raise GraphError(
                f"Problem {name!r} has {argument}=, which needs problems that move one after the "
                "other. Use order='lower_first'."
            )
        moved = schedule[: schedule.index(name)]
        for other in graph.values_in[name]:
            if other in moved:
                raise GraphError(
                    f"Problem {name!r} sees the value of {other!r}, which moves before it in a "
                    f"simultaneous round. List {other!r} below {name!r}, or use "
                    "order='lower_first'."
                )


def _check_estimator(
    graph: DependencyGraph,
    engines: Engines,
    name: str,
    parallel: DataParallel | None,
    advice: EngineAdvice,
) -> None:
    """Refuses an estimator if something else relies on an uncorrected gradient."""
    problem, engine = graph.problems[name], engines[name]
    if engine.fresh_products and name in differentiated_problems(graph, engines):
        _check_fresh(problem, engine)
    if problem.estimator is None:
        return
    label = problem.estimator.name
    if name in differentiated_problems(graph, engines) and isinstance(engine, StepEngine):
        raise EngineError(
            f"Problem {name!r} has the estimator {label!r}, but {engine.label!r} differentiates "
            "its step as if it were made with the gradient of one batch."
            + advice.phrase(
                " Use an engine that does not differentiate steps, such as {}.", *SOBA_FIRST
            )
        )
    if (
        name in differentiated_problems(graph, engines)
        and problem.after_step is not None
        and engine.takes_estimates
    ):
        raise EngineError(
            f"Problem {name!r} has the estimator {label!r} and after_step=. {engine.label!r} "
            "corrects products with the Hessian of the loss, but products of a projected step "
            f"are not linear in it. Drop one of the two{advice.phrase(', or use {}', 'gmres')}."
        )
    if problem.accumulate_solves > 1 or problem.restart_from is not None:
        argument = "restart_from" if problem.restart_from is not None else "accumulate_solves"
        raise ProblemError(
            f"Problem {name!r} has the estimator {label!r}, which follows one sequence of "
            f"iterates and solves, and {argument}=, which begins new ones. Drop one of the two."
        )
    if parallel is not None:
        raise ProblemError(
            f"Problem {name!r} has the estimator {label!r}, which supports a single process only. "
            "Drop estimator=, or distributed=."
        )
    if len(problem.player_moves) > 1:
        raise ProblemError(
            f"Problem {name!r} has the estimator {label!r}, which supports only games whose "
            "players all move together. Drop player_steps=."
        )
    through = {inner: engines[inner] for inner in inner_responses(graph, engines, name)}
    if len({other.takes_estimates for other in through.values()}) > 1:
        raise EngineError(
            f"Problem {name!r} has the estimator {label!r}, and its gradient goes through "
            f"{', '.join(f'{inner!r} ({other.label})' for inner, other in through.items())}: "
            "estimates of terms for 'soba', and of the whole for the others. Give them engines of "
            "one kind."
        )
    if problem.estimator.uses_earlier_point:
        for inner, other in through.items():
            if isinstance(other, StepEngine):
                raise EngineError(
                    f"Problem {name!r} has the estimator {label!r}, which repeats its gradient at "
                    f"an earlier point, but {other.label!r} differentiates the step that "
                    f"{inner!r} has just made. Give {inner!r} an implicit engine"
                    + advice.on(inner).phrase(", such as {}", *SOBA_FIRST)
                    + "."
                )
    if problem.estimator.uses_blocks and engine.takes_estimates and problem.solve_batches > 1:
        raise ProblemError(
            f"Problem {name!r}: the estimator {label!r} compares single blocks, but "
            f"solve_batches={problem.solve_batches} averages several. Use larger blocks."
        )


def _check_fresh(problem: Problem, engine: AbstractEngine) -> None:
    """Refuses products on fresh batches if there are none."""
    if problem.solve_data is None:
        raise EngineError(
            f"Problem {problem.name!r}: {engine.label!r} takes each product on a fresh batch, but "
            "the problem has none. Pass solve_data= (the problem's own data will do)."
        )


def check_restarts(
    graph: DependencyGraph,
    engines: Engines,
    starts: Mapping[str, Start],
    *,
    looks_ahead: Collection[str] = (),
) -> None:
    """Refuses engines that would lose the derivative of a solution with respect to its start.

    Args:
        graph: the problems.
        engines: problem → engine of its solution.
        starts: problem → where it starts each block of its steps.
        looks_ahead: the problems that see lower solutions one step ahead.

    Raises:
        EngineError: naming the problem and an engine that keeps it.
    """
    differentiated = differentiated_starts(graph, engines, starts)
    for name, start in starts.items():
        problem, engine = graph.problems[name], engines[name]
        if isinstance(engine, (FirstOrder, StepEngine)):
            for reader in looks_ahead:
                if name in graph.solutions_in[reader]:
                    raise EngineError(
                        f"Problem {reader!r} moves first in a round and looks one step ahead at "
                        f"the solution of {name!r}, which restarts from the value of "
                        f"{start.problem!r}. Use order='lower_first', or an implicit engine."
                    )
        if name in differentiated:
            _check_start(problem, engine, start)


def _check_start(problem: Problem, engine: AbstractEngine, start: Start) -> None:
    name, steps = problem.name, problem.steps
    if isinstance(engine, StepEngine):
        if not engine.takes_start:
            raise EngineError(
                f"Problem {name!r} restarts from {problem.restart_from!r}, but {engine.label!r} "
                f"does not differentiate with respect to it. Use mlo.Unroll(steps={steps})"
                f"{', one_step' if steps == 1 else ''} or 'first_order'."
            )
        if engine.recorded_steps < steps:
            raise EngineError(
                f"Problem {name!r} restarts before every {steps} steps, but {engine.label!r} "
                f"differentiates {engine.recorded_steps} of them: the derivative in "
                f"{start.problem!r}, their start, would be lost. Use mlo.Unroll(steps={steps}) or "
                "'first_order'."
            )
        if len(problem.player_moves) > 1:
            raise EngineError(
                f"Problem {name!r} has player_steps, but {engine.label!r} differentiates the last "
                f"move only: the derivative in {start.problem!r}, their start, would be lost. Drop "
                "player_steps, or use 'first_order'."
            )
        return
    reads = (*problem.loss_reads, *problem.after_step_reads)
    if not isinstance(engine, FirstOrder) and start.problem not in reads:
        raise EngineError(
            f"Problem {name!r} restarts from {start.problem!r}, which its loss does not read. "
            f"{engine.label!r} differentiates the condition that the gradient of the loss is "
            f"zero, which forgets the start: the derivative in {start.problem!r} would be zero. "
            f"Read it in the loss (a proximal term, as in iMAML), or use mlo.Unroll(steps={steps}) "
            "or 'first_order'."
        )


def _check_sharding(
    graph: DependencyGraph, engines: Engines, name: str, parallel: DataParallel | None
) -> None:
    """Refuses what cannot be done with sharded parameters (DTensors)."""
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
            f"Problem {name!r} has sharded parameters, which grad_clip does not support. Drop it."
        )
    if acts_around_step(problem):
        raise EngineError(
            f"Problem {name!r} has sharded parameters, and after_step=, settings= and "
            "restart_from= would see only parts of them. Drop these options, or keep the "
            "parameters whole."
        )
    differentiated = differentiated_problems(graph, engines)
    if name in differentiated and not engine.takes_sharded:
        raise EngineError(
            f"Problem {name!r} has sharded parameters, which Betty's functions do not support. "
            f"Use an engine other than {engine.label!r}."
        )
    # A gradient within a gradient: a lower problem whose own gradient contains a response.
    for middle in differentiated:
        inner = set(inner_responses(graph, engines, middle))
        if inner and (name == middle or name in inner):
            raise EngineError(
                f"Problem {name!r} has sharded parameters, and its response is differentiated "
                "twice (a gradient within a gradient), which needs whole parameters."
            )


# ------------------------------ on the first batch


class LossChecks:
    """Refuses losses, on their first batch, that lack a derivative that is needed.

    What they find silently wrong is looked for again at the updates 2, 4, 8, …, since a loss may
    begin to use it at any time.

    Args:
        graph: the problems.
        engines: problem → engine of its solution.
        advice: problem → what messages on it may advise.

    Attributes:
        pending: problem → its pending checks on a first batch; an entry is removed after all of the
            problem's players were checked.
        displaced: the problems whose losses are evaluated with other tensors in the places of
            their own parameters. Not those that are compiled, since a compiled module is compiled
            once more for tensors of another kind.
    """

    def __init__(
        self, graph: DependencyGraph, engines: Engines, advice: Mapping[str, EngineAdvice]
    ) -> None:
        self._graph, self._engines, self._advice = graph, engines, advice
        differentiated = differentiated_problems(graph, engines)
        twice = {name for name in differentiated if engines[name].uses_second_derivatives}
        estimated = {name for name, p in graph.problems.items() if p.estimator is not None}
        compiled = {name for name, problem in graph.problems.items() if problem.runs_compiled}
        self.displaced = (differentiated | estimated) - compiled
        self.pending: dict[str, Examine] = {}
        self._later: dict[str, Examine] = {}
        for name in graph.problems:
            strays = _strays(graph, name, differentiated, displaced=name in self.displaced)
            look = partial(_examine, name, strays, advice[name], name in twice)
            self.pending[name], self._later[name] = partial(look, True), partial(look, False)
        self._warned: set[str] = set()

    def examine(self, name: str, *, again: bool) -> Examine | None:
        """What to show a problem's loss to, before it is differentiated.

        Args:
            name: the problem.
            again: whether it is looked at also if it was before.
        """
        return self.pending.get(name) or (self._later[name] if again else None)

    def check_optimizer_states(self, name: str) -> None:
        """Refuses a loss that looks up an optimizer's state under a stand-in for a parameter.

        Raises:
            ProblemError: naming it. The entries that this has made are gone.
        """
        for problem in self._graph.problems.values():
            for optimizer in problem.optimizers.values():
                known = {id(p) for group in optimizer.param_groups for p in group["params"]}
                made = [
                    key
                    for key in optimizer.state
                    if getattr(key, "_is_param", False) and id(key) not in known
                ]
                for key in made:  # a state that has them could not be saved
                    del optimizer.state[key]
                if made:
                    raise ProblemError(
                        f"The loss of problem {name!r} looks up optimizer.state by parameters. "
                        "While solutions are differentiated, other tensors are in their places, "
                        "which have no state; and the state moves on. Keep copies of what the loss "
                        "needs in buffers of the module, by the parameters' names."
                    )

    def call_hooks(
        self, name: str, hooks: Mapping[str, Mapping[int, Any]], gradient: Tensors
    ) -> Tensors:
        """Shows a gradient to the hooks on its parameters; returns it as they changed it.

        Args:
            name: the problem, whose solution is differentiated.
            hooks: parameter → its hooks (`register_hook`).
            gradient: parameter → gradient.

        Raises:
            ProblemError: if a hook changes a gradient whose step is differentiated.
        """
        found = dict(gradient)
        for key, own in hooks.items():
            # A hook may return another gradient or change this one in place, so it gets a copy.
            seen = gradient[key].clone()
            for hook in own.values():
                answer = hook(seen)
                seen = seen if answer is None else answer
            if torch.equal(seen, gradient[key]):
                continue
            found[key] = seen
            engine = self._engines[name]
            if isinstance(engine, StepEngine):
                raise ProblemError(
                    f"A hook on parameter {key!r} of problem {name!r} (register_hook) changes its "
                    f"gradient, but the engine {engine.label!r} differentiates the step that is "
                    "made with it, so the change would be missing. Put the change into the loss, "
                    "or choose an engine that does not differentiate steps"
                    f"{self._advice[name].phrase(', such as {}', *WITHOUT_STEPS)}."
                )
            if f"{name}.{key}" not in self._warned:
                self._warned.add(f"{name}.{key}")
                warn_user(
                    f"A hook on parameter {key!r} of problem {name!r} (register_hook) changes its "
                    f"gradient. The engine {engine.label!r} differentiates the condition that the "
                    "gradient of the loss is zero, which knows nothing of the hook. Remove "
                    "parameters that a hook keeps from moving from the module, or freeze them."
                )
        return found

    def explain_zero(self, name: str, resting: Collection[str]) -> None:
        """Says why a loss has no derivative in any parameter.

        Args:
            name: the problem.
            resting: the problems that do not move in this round.

        Raises:
            ProblemError: if the loss depends on no parameter.
        """
        # Two causes are legitimate and only cause a warning: an engine that drops the implicit
        # term, and a lower problem that is constant during its warm-up.
        earlier = list(self._graph.problems)[: self._graph.position[name]]
        dropped = [other for other in earlier if isinstance(self._engines[other], FirstOrder)]
        still = [other for other in earlier if other in resting]
        if not dropped and not still:
            order = _order_hint(self._graph, name)
            raise ProblemError(
                f"The loss of problem {name!r} does not depend on any parameter: it was detached, "
                f"computed under torch.no_grad(), or reads none.{order}"
            )
        if name not in self._warned:
            self._warned.add(name)
            cause, advice = f"warm-up of {', '.join(still)}", ""
            if dropped:
                cause = f"'first_order' of {', '.join(dropped)}"
                advice = " Choose an engine that keeps it" + self._advice[dropped[-1]].phrase(
                    ", such as {}", "one_step", *WITHOUT_STEPS
                )
                advice += "."
            warn_user(
                f"The gradient of problem {name!r} is zero: its loss depends only on the solutions "
                f"of other problems, and the {cause} drops their derivative.{advice}"
            )


def _order_hint(graph: DependencyGraph, name: str) -> str:
    """How a loss would depend on its own problem in another order; empty if in none."""
    # The problems that it reads, by way of others too, and that so read it: solutions of these are
    # functions of it, where they are listed before it.
    reached = _reached(graph, graph.reads[name])
    able = [other for other in reached if name in _reached(graph, graph.reads[other])]
    later = [other for other in graph.problems if other in able and other in _after(graph, name)]
    if not later:
        return ""
    listed = ", ".join(later)
    direct = [other for other in later if other in graph.reads[name]]
    how = f"It reads {', '.join(direct)}, listed after it, as constants."
    if not direct:
        through = ", ".join(other for other in graph.reads[name] if other in able)
        how = f"It reads {through}, which depends on {name!r} through {listed}, listed after it."
    return (
        f" {how} Problems are listed from the innermost to the outermost. To differentiate their "
        f"solutions, list {listed} before {name!r}."
    )


def _after(graph: DependencyGraph, name: str) -> list[str]:
    """The problems listed after one."""
    return list(graph.problems)[graph.position[name] + 1 :]


def _reached(graph: DependencyGraph, names: Collection[str]) -> set[str]:
    """These problems and all that they read, by way of others too."""
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += graph.reads[name]
    return found


def _examine(
    name: str,
    strays: Mapping[int, tuple[str, str, str]],
    advice: EngineAdvice,
    twice: bool,
    first: bool,
    loss: Tensor,
    parameters: Sequence[Tensor],
) -> None:
    """Looks at a loss whose gradient is differentiated `twice`, or once."""
    check_checkpointing(name, loss)
    for leaf in leaves_of(loss):
        if id(leaf) in strays:
            raise _stray(name, *strays[id(leaf)])
    if twice and first:
        check_double_backward(name, loss, parameters, advice)
    elif twice:  # an operation that fails would say so itself
        check_silent_operations(name, loss, advice)


def _strays(
    graph: DependencyGraph, name: str, differentiated: Collection[str], *, displaced: bool
) -> dict[int, tuple[str, str, str]]:
    """Identity of a parameter that may not be in a loss's graph → (problem, its name, whose).

    While the loss is looked at, copies and aliases stand for the parameters of the problems that it
    reads, and for its own if it is ever evaluated with others in their places. So a live parameter
    in the graph came some other way, by which its stand-in is not seen.

    Args:
        graph: the problems.
        name: whose loss.
        differentiated: the problems whose solutions are differentiated.
        displaced: whether the loss is evaluated with others in the places of its own parameters.
    """
    found: dict[int, tuple[str, str, str]] = {}
    for other, problem in graph.problems.items():
        kind = "read" if other in graph.reads[name] else "undeclared"
        if other == name:
            kind = "own"
        # Where nothing is differentiated through, a stray parameter is the constant that it should
        # be.
        allowed = name not in differentiated and other not in differentiated
        if (kind == "own" and not displaced) or (kind == "read" and allowed):
            continue
        for key, parameter in problem.parameters.items():
            # A sharded parameter has no stand-in while the loss is looked at: it is gathered.
            if kind == "undeclared" or not is_sharded(parameter):
                found[id(parameter)] = other, key, kind
    return found


def _stray(name: str, other: str, key: str, kind: str) -> ProblemError | GraphError:
    """The error for a loss that uses a live parameter where another tensor stands for it."""
    if kind == "undeclared":
        return GraphError(
            f"The loss of problem {name!r} uses parameter {key!r} of problem {other!r} "
            "without naming that problem (a closure, a global or an attribute), so the "
            f"gradient would miss it. Add the keyword-only argument {other}, as in `def "
            f"loss(module, batch, *, {other})`, and use the module that you receive. If its "
            "value should be constant, detach the tensor."
        )
    error: type[ProblemError | GraphError] = GraphError
    whose = f"parameter {key!r} of problem {other!r}"
    if kind == "own":
        error, whose = ProblemError, f"its own parameter {key!r}"
    return error(
        f"The loss of problem {name!r} uses {whose} by another way than through the module that "
        "it receives: a list of parameters made outside of the loss, an optimizer's param_groups, "
        "a Python list that holds it, a result kept from an earlier call. To differentiate "
        "solutions, losses are evaluated with other tensors in the places of their modules' "
        "parameters, which that way does not see. Read parameters inside the loss from the module "
        "that it receives (`module.parameters()`; a module keeps a list of them as an "
        "nn.ParameterList). If the value should be constant, detach the tensor."
    )


def explain_third_derivative(error: BaseException, evaluation: Evaluation) -> None:
    """Says which problem's loss has no third derivative, if that is the error.

    Raises:
        EngineError: naming it.
    """
    if not isinstance(error, RuntimeError) or not is_about_third_derivative(error):
        return
    waiting = list(evaluation.solutions.values())
    seen: set[int] = set()  # many paths may lead to one solution
    names: list[str] = []
    advice = EngineAdvice()
    for solution in waiting:
        if isinstance(solution, (Stationary, Stepped)) and id(solution) not in seen:
            seen.add(id(solution))
            waiting += solution.evaluation.solutions.values()
            if solution.evaluation.loss.advice.third and solution.name not in names:
                names.append(solution.name)
                advice = solution.evaluation.loss.advice
    named = " or ".join(names) or evaluation.loss.problem.name
    raise no_third_derivative(named, f"an operation without one ({error})", advice) from error


# ------------------------------ of steps


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
        if first or any(map(_has_code_around_step, optimizers)):
            return True
        return at_power_of_two and any(map(is_foreign, optimizers))

    def check(
        self,
        problem: Problem,
        engine: AbstractEngine,
        step: OptimizerStep,
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
                    f"than {_suspect(problem)} would, but the engine {engine.label!r} "
                    "differentiates the optimizer's own step, so that change would be missing. "
                    "Put the change into the loss (or use grad_clip=, or an optimizer whose "
                    "whole step is differentiable and whose state is in its `state` or "
                    "`param_groups`, not in attributes), or choose an engine that does not "
                    f"differentiate steps{advice.phrase(', such as {}', *WITHOUT_STEPS)}."
                )

        # Then its derivative, which torch.optim's classes need not prove.
        if not any(map(is_foreign, problem.optimizers.values())):
            return
        error = step.derivative_error(before, gradient)
        if not error <= DERIVATIVE_TOLERANCE:
            raise ProblemError(
                f"Problem {problem.name!r}: the derivative of a step of "
                f"{type(next(iter(problem.optimizers.values()))).__name__}, or of the two with the "
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
            if _has_code_around_step(optimizer):
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


DERIVATIVE_TOLERANCE = 1e-2
"""Largest relative error of a step's derivative, which is compared in double precision."""


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


BESIDE = 1e-2
"""How far from the parameters `after_step` is examined, relative to their size."""


def _has_code_around_step(optimizer: Optimizer) -> bool:
    """Whether there is code around the optimizer's step: hooks, or a `step` put on the object."""
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return True
    # A scheduler wraps `step` on the object as well, to count calls; that changes nothing.
    own = optimizer.__dict__.get("step")
    return own is not None and not hasattr(own, "_wrapped_by_lr_sched")


def _suspect(problem: Problem) -> str:
    for optimizer in problem.optimizers.values():
        name = type(optimizer).__name__
        if _has_code_around_step(optimizer):
            return f"the step of {name} without the hooks around it (register_step_post_hook, say)"
    names = sorted({type(optimizer).__name__ for optimizer in problem.optimizers.values()})
    return f"a step of {', '.join(names)} alone"


def _same_step(twin: Tensor, made: Tensor, before: Tensor) -> bool:
    """Whether two steps from `before` end at one place, up to rounding."""
    # Relative to the step's length, but never finer than the parameters can be represented.
    twin, made = twin.detach(), made.detach()
    rounding = 8.0 * torch.finfo(made.dtype).eps * float(made.norm() + before.norm())
    return float((twin - made).norm()) <= 1e-3 * float((made - before).norm()) + rounding
