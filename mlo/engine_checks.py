"""Checks, before the first step, that engines can differentiate what they are chosen for."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial

import torch

from mlo.advice import EXACT, SOBA_FIRST, WITHOUT_STEPS, EngineAdvice
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
from mlo.hypergradient.first_order import FirstOrder
from mlo.hypergradient.identity import Identity
from mlo.hypergradient.one_step import OneStep
from mlo.hypergradient.products import Engine
from mlo.hypergradient.registry import engine_from
from mlo.optimizer_traits import (
    acts_around_step,
    check_settings,
    decays_outside_gradient,
    has_differentiable_step,
    makes_known_step,
    moves_on_surface,
)
from mlo.problem import Problem
from mlo.restart import Start, starts_of
from mlo.sharding import is_sharded
from mlo.solution import AbstractEngine, StepEngine

__all__ = ["check_engines", "check_restarts", "engine_advice"]


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
        # Of steps that are not torch.optim's it is not known yet whether they will be refused.
        known = all(map(makes_known_step, problem.optimizers.values()))
        return not isinstance(engine, StepEngine) or (known and not simultaneous)

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


# ------------------------------ one problem and its engine


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
    if isinstance(engine, StepEngine):
        _check_step_engine(problem, engine, advice)
    else:
        _check_implicit(problem, engine, advice)


def _check_implicit(problem: Problem, engine: AbstractEngine, advice: EngineAdvice) -> None:
    """Refuses an engine of the stationarity condition where it would solve another one."""
    name = problem.name
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


def _check_step_engine(problem: Problem, engine: StepEngine, advice: EngineAdvice) -> None:
    """Refuses an engine of the optimizer's step for steps that it cannot differentiate."""
    name = problem.name
    without = [o for o in problem.optimizers.values() if not has_differentiable_step(o)]
    if without:
        raise EngineError(
            f"Problem {name!r}: its optimizer {type(without[0]).__name__} has no differentiable "
            f"step (no option `differentiable`), but {engine.label!r} needs one. Use one that has "
            "it, such as torch.optim.SGD or AdamW, or an engine that does not differentiate the "
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
        if moves_on_surface(optimizer):
            warn_user(
                f"Problem {problem.name!r}: {name} moves a parameter on a surface (a step with the "
                "gradient θ does not move θ), where solutions have a gradient that is normal to "
                f"it. The engine {engine.label!r} differentiates the condition that the gradient "
                "is zero, so the hypergradient is wrong. Use torch.optim.SGD, with the projection "
                f"onto the surface in after_step={advice.phrase(', and {}', 'gmres', 'unroll')}."
            )
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


# ------------------------------ problems together


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


# ------------------------------ estimators, starts, sharded parameters


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
