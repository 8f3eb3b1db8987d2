"""Checks that losses have the derivatives needed, and read parameters only as they receive them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mlo.advice import WITHOUT_STEPS, EngineAdvice
from mlo.errors import GraphError, ProblemError, warn_user
from mlo.gradient_paths import Engines, differentiated_problems, readers_of_response
from mlo.graph import DependencyGraph
from mlo.hypergradient.double_backward import (
    SecondDerivative,
    check_checkpointing,
    check_compiled,
    check_double_backward,
    check_silent_operations,
    inputs_of_second,
    is_about_third_derivative,
    leaves_of,
    no_third_derivative,
)
from mlo.hypergradient.first_order import FirstOrder
from mlo.hypergradient.hidden_parts import (
    Displace,
    Function,
    find_hidden_part,
    functions_of,
    hidden_part_message,
)
from mlo.loss import Examine
from mlo.problem import Problem, Tensors
from mlo.randomness import preserved
from mlo.sharding import is_sharded
from mlo.solution import AbstractEngine, Evaluation, Stationary, StepEngine, Stepped

__all__ = ["LossChecks", "explain_third_derivative"]


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
        twice: the problems whose losses are differentiated twice.
        displaced: the problems whose losses are evaluated with other tensors in the places of
            their own parameters. Not those that are compiled, since a compiled module is compiled
            once more for tensors of another kind.
    """

    def __init__(
        self, graph: DependencyGraph, engines: Engines, advice: Mapping[str, EngineAdvice]
    ) -> None:
        self._graph, self._engines, self._advice = graph, engines, advice
        differentiated = differentiated_problems(graph, engines)
        self.twice = {name for name in differentiated if engines[name].uses_second_derivatives}
        estimated = {name for name, p in graph.problems.items() if p.estimator is not None}
        compiled = {name for name, problem in graph.problems.items() if problem.runs_compiled}
        self.displaced = (differentiated | estimated) - compiled
        self.pending: dict[str, Examine] = {}
        self._later: dict[str, Examine] = {}
        # Problem → what its losses, examined just now, have called; whether no engine
        # differentiates a gradient that contains its response; whether the second derivative is
        # taken in what the loss reads only.
        self._functions: dict[str, set[Function]] = {name: set() for name in graph.problems}
        self._once: dict[str, bool] = {}
        self._mixed: dict[str, bool] = {}
        for name in graph.problems:
            strays = _strays(graph, name, differentiated, displaced=name in self.displaced)
            self._once[name] = not readers_of_response(graph, engines, name)
            self._mixed[name] = _is_mixed(graph.problems[name], engines[name])
            look = partial(
                _examine,
                name=name,
                strays=strays,
                advice=advice[name],
                twice=name in self.twice,
                mixed=self._mixed[name],
                once=self._once[name],
                functions=self._functions[name],
            )
            self.pending[name] = partial(look, first=True)
            self._later[name] = partial(look, first=False)
        self._warned: set[str] = set()
        self._asked: set[str] = set()

    def examine(self, name: str, *, again: bool) -> Examine | None:
        """What to show a problem's loss to, before it is differentiated.

        Args:
            name: the problem.
            again: whether it is looked at also if it was before.
        """
        return self.pending.get(name) or (self._later[name] if again else None)

    def examine_before_updates(self, evaluation: Evaluation) -> None:
        """Looks, once, at a loss whose solution is differentiated before its problem moves.

        Args:
            evaluation: of the loss.

        Raises:
            EngineError: if it lacks a derivative that is needed.
            ProblemError: if it reads parameters otherwise than as it receives them.
        """
        loss, name = evaluation.loss, evaluation.loss.problem.name
        examine = self.pending.get(name)
        if examine is None or name in self._asked or not self._can_evaluate(evaluation):
            return
        self._asked.add(name)

        def at(parameters: Tensors, reads: dict[str, Tensors]) -> None:
            leaves = _leaves_of(evaluation, parameters, reads)
            with (
                torch.enable_grad(),
                evaluation.losses(parameters, reads) as losses,
                preserved(loss.problem.generators),
            ):
                for value in losses.values():
                    examine(value, leaves)

        evaluation.at_stand_ins(at)
        self.check_functions(evaluation)

    def check_functions(self, evaluation: Evaluation) -> None:
        """Warns of a `torch.autograd.Function` in a loss whose backward hides a part of itself.

        Args:
            evaluation: of the loss, which was examined.
        """
        name = evaluation.loss.problem.name
        functions = set(self._functions[name])
        self._functions[name].clear()  # a class that a loss has made may hold tensors
        if not functions or not self._can_evaluate(evaluation):
            return

        def at(parameters: Tensors, reads: dict[str, Tensors]) -> str | None:
            def losses(displaced: Displace) -> AbstractContextManager[dict[str, Tensor]]:
                return evaluation.losses(
                    {key: displaced(tensor) for key, tensor in parameters.items()},
                    {
                        read: {key: displaced(tensor) for key, tensor in tensors.items()}
                        for read, tensors in reads.items()
                    },
                    players=tuple(evaluation.value) or None,
                )

            first = _leaves_of(evaluation, parameters, reads) if self._once[name] else None
            second = [tensor for read in reads.values() for tensor in read.values()]
            taken = SecondDerivative(first, second if self._mixed[name] else None)
            return find_hidden_part(losses, functions, taken)

        found = evaluation.at_stand_ins(at)
        if found is not None and f"{name}: {found}" not in self._warned:
            self._warned.add(f"{name}: {found}")
            warn_user(hidden_part_message(name, found, self._advice[name]))

    def _can_evaluate(self, evaluation: Evaluation) -> bool:
        """Whether a loss can be evaluated once more, only to look at it."""
        loss, name = evaluation.loss, evaluation.loss.problem.name
        # Processes might not do alike what depends on their own numbers. A compiled module may be
        # compiled once more for parameters of another kind.
        seen = [self._graph.problems[other] for other in (name, *self._graph.reads[name])]
        return not (
            loss.parallel is not None
            or loss.sharded
            or loss.problem.device.type == "meta"
            or loss.checks.was_dismissed("stand-ins")
            or any(problem.runs_compiled for problem in seen)
        )

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


def _leaves_of(
    evaluation: Evaluation, parameters: Tensors, reads: Mapping[str, Tensors]
) -> list[Tensor]:
    """The tensors in which a problem's gradient differentiates its loss.

    Args:
        evaluation: of the loss.
        parameters: what stands for the problem's own parameters.
        reads: problem that the loss reads → what stands for its parameters.
    """
    found = list(parameters.values())
    for name, tensors in reads.items():
        solution = evaluation.solutions.get(name)
        if solution is not None and evaluation.depends(solution):
            found += tensors.values()
    return found


def _examine(
    loss: Tensor,
    leaves: Sequence[Tensor],
    *,
    name: str,
    strays: Mapping[int, tuple[str, str, str]],
    advice: EngineAdvice,
    twice: bool,
    mixed: bool,
    once: bool,
    functions: set[Function],
    first: bool,
) -> None:
    """Looks at a loss before it is differentiated.

    Args:
        loss: its value, with its graph.
        leaves: in which it is differentiated first.
        name: its problem.
        strays: parameters that may not be in the graph; see `_strays`.
        advice: names other engines.
        twice: whether it is differentiated twice.
        mixed: whether the second derivative is taken in what the loss reads only.
        once: whether no engine differentiates a gradient that contains the problem's response.
        functions: those that the loss calls are added, if their second derivative is taken.
        first: whether it is the problem's first look, which tries a double backward pass.
    """
    check_checkpointing(name, loss)
    for leaf in leaves_of(loss):
        if id(leaf) in strays:
            raise _stray_error(name, *strays[id(leaf)])
    if twice and first:
        check_double_backward(name, loss, leaves, advice, mixed=mixed, once=once)
    elif twice:  # an operation that fails would say so itself
        second = inputs_of_second(loss, leaves, mixed=mixed)
        check_compiled(name, loss, SecondDerivative(leaves, second), advice)
        check_silent_operations(name, loss, leaves if once else None, advice)
    if twice:
        functions |= functions_of([loss], SecondDerivative(first=leaves if once else None))


def _is_mixed(problem: Problem, engine: AbstractEngine) -> bool:
    """Whether an engine differentiates the lower gradient in what it reads, and never in θ."""
    # A step from a constant θ does not need ∂F/∂θ; one from a value from above, or after another
    # step, does. Engines that sweep have no product with A.
    one = isinstance(engine, StepEngine) and engine.recorded_steps == 1
    return (engine.sweeps or one) and problem.restart_from is None


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


def _stray_error(name: str, other: str, key: str, kind: str) -> ProblemError | GraphError:
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
