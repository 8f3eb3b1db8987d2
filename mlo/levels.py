"""The solutions of lower problems as losses read them during a run, found from its `History`.

There are two `Levels`. One gives the solutions as losses read them now. The other gives them one
step ahead, for problems that begin a round although others are below them. Each caches its own
solutions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from operator import is_
from typing import Any

import torch
from torch import Tensor

from mlo.check_schedule import is_power_of_two
from mlo.errors import ProblemError
from mlo.graph_memory import NotCountable, SavedBytes, refuses_counting
from mlo.history import History
from mlo.hypergradient.first_order import FirstOrder
from mlo.loss_checks import explain_third_derivative
from mlo.loss_errors import explain_frozen
from mlo.optimizer_step import OptimizerStep
from mlo.problem import Problem, Tensors
from mlo.projected_step import ProjectedStep
from mlo.randomness import RandomState, preserved
from mlo.solution import (
    AbstractEngine,
    Constant,
    Evaluation,
    RecordedStep,
    Solution,
    Started,
    Stationary,
    StepEngine,
    Stepped,
    restore_buffers,
)
from mlo.tensors import copies, tensors_of, versions_of
from mlo.total_gradient import Flow, TotalGradient, total_gradient

__all__ = ["Levels"]


class Levels:
    """The solutions of lower problems as a loss reads them, and evaluations that read them.

    Args:
        history: what has happened.
        ahead: whether solutions are seen one step ahead: with the batches that come next, and the
            steps that optimizers would make on them.
    """

    def __init__(self, history: History, *, ahead: bool = False) -> None:
        self._history, self._ahead, self._asking = history, ahead, False
        self._known: dict[str, tuple[tuple[int, ...], Solution]] = {}
        # How often a search for solutions has evaluated losses or looked for batches, which draw
        # numbers (a DataLoader that shuffles does so too).
        self._draws = 0
        graph = history.graph
        # Walking the modules at every update would take longer than copying their buffers, so the
        # dicts that hold buffers are found once.
        self._buffers: dict[str, list[tuple[str, dict[str, Tensor | None]]]] = {}
        for name, problem in graph.problems.items():
            modules = problem.module.named_modules()
            self._buffers[name] = [
                (f"{prefix}." if prefix else "", module._buffers) for prefix, module in modules
            ]
        # The problem, and those that its loss reads.
        self._seen = {name: (name, *graph.reads[name]) for name in graph.problems}
        # Frozen parameters may be moved by the user (a mean teacher, a target network). Where an
        # evaluation is repeated they are recorded like buffers, which a large frozen backbone is
        # not worth: it stays as it is.
        self._frozen: dict[str, dict[str, Tensors]] = {}
        for name in graph.problems:
            frozen = {other: _frozen(graph.problems[other]) for other in self._seen[name]}
            size = sum(p.numel() for tensors in frozen.values() for p in tensors.values())
            if size <= max(FEW_FROZEN, FROZEN_SHARE * graph.problems[name].size):
                self._frozen[name] = {
                    other: tensors for other, tensors in frozen.items() if tensors
                }
        # Whose engines differentiate steps, and how many. (`isinstance` on an ABC is slow.)
        self._by_steps: dict[str, int] = {}
        for name, engine in history.engines.items():
            steps = engine.recorded_steps if isinstance(engine, StepEngine) else 0
            self._by_steps[name] = steps
        # The problems on which a solution depends; it is made again after any of these has moved. A
        # problem that shares a module's buffers (a frozen encoder's statistics) moves these too.
        self._dependencies: dict[str, tuple[str, ...]] = {}
        for name in graph.problems:
            through = [self._dependencies[lower] for lower in graph.reads_below[name]]
            own: set[str] = set()
            for seen in (name, *graph.reads_above[name]):
                own |= self._holders_of_buffers(seen)
            self._dependencies[name] = tuple(sorted(own.union(*through)))

    def _holders_of_buffers(self, name: str) -> set[str]:
        """The problem, and the others whose modules have a buffer of it."""
        own = {id(registry) for _, registry in self._buffers[name]}
        found = {name}
        for other, registries in self._buffers.items():
            if any(registry and id(registry) in own for _, registry in registries):
                found.add(other)
        return found

    # ------------------------------ solutions

    def find(self, name: str) -> Solution:
        """The problem's solution."""
        history, engine = self._history, self._history.engines[name]
        rests = history.round < history.graph.problems[name].warmup_steps
        # After a step, its solution holds until the next step. (Looking ahead, no step has been
        # made yet.)
        if self._by_steps[name] and not rests and not self._ahead:
            stepped = history.last_step(name)
            if stepped is not None:
                history.warn_of_cut_chain(name, stepped)
                if history.resumed:
                    history.warn_of_missing_steps(name, stepped)
                return stepped
        # Any other solution is made once, and again only after something that it depends on moved.
        updates = map(history.updates.__getitem__, self._dependencies[name])
        stamp = (int(rests), *updates)
        known = self._known.get(name)
        if known is None or known[0] != stamp:
            solution: Solution
            if rests:
                solution = self._constant(name, FirstOrder())
            elif name in history.starts and isinstance(engine, (FirstOrder, StepEngine)):
                # No step was made from there (all were left out), or engine and state know none.
                value: Tensors = dict(history.graph.problems[name].parameters)
                solution = Started(
                    name=name, engine=FirstOrder(), value=value, start=history.start_of(name)
                )
            elif isinstance(engine, FirstOrder):
                solution = self._constant(name, engine)
            elif isinstance(engine, StepEngine):
                solution = self._stepped(name, engine)
            else:
                solution = self._stationary(name, engine)
            known = self._known[name] = (stamp, solution)
        if not self._ahead and isinstance(known[1], (Stepped, Started)):
            history.warn_of_missing_steps(name, known[1])
            history.warn_of_no_steps(name, known[1])
        return known[1]

    def forget(self) -> None:
        """Forgets the solutions, after batches or parameters were exchanged."""
        self._known.clear()

    def copied_solutions(self) -> dict[str, tuple[tuple[int, ...], Solution]]:
        """What is known of the solutions, for `restore_solutions`."""
        return dict(self._known)

    def restore_solutions(self, known: dict[str, tuple[tuple[int, ...], Solution]]) -> None:
        """Forgets the solutions that were made since `copied_solutions` returned `known`."""
        self._known = known

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Runs the body, which only asks for gradients, and leaves everything as it was."""
        # What a gradient moves: the random state, engines' memories, cached solutions and graphs.
        history, known, asking = self._history, dict(self._known), self._asking
        memory, graphs = history.copied_memory(), list(history.graphs)
        if history.simultaneous:  # a question is about the problems' current points
            self._known = {}
        with preserved(history.generators):
            try:
                self._asking = True
                yield
            finally:
                self._known, history.graphs, self._asking = known, graphs, asking
                history.restore_memory(memory)

    def _constant(self, name: str, engine: AbstractEngine) -> Constant:
        """The current parameters of a problem in warm-up, or whose derivative is dropped."""
        value: Tensors = dict(self._history.graph.problems[name].parameters)
        begun = self._as_it_began(name)
        if begun is not None:
            value = begun.parameters
        return Constant(name=name, engine=engine, value=value)

    def _stationary(self, name: str, engine: AbstractEngine) -> Stationary:
        """The current parameters as a solution of the problem's stationarity condition."""
        # Without data for solves: at the batches, noise and modes of the last update. F is then the
        # gradient that the optimizer followed, at the place where it led.
        history, problem = self._history, self._history.graph.problems[name]
        last, begun = self._last(name), self._as_it_began(name)
        fresh: list[tuple[Any, ...]] = []
        if name in history.solve_streams:
            last = None
            *fresh, batches = self._solve_batches(name, 1 + engine.fresh_products)
        else:
            batches = self.batches(name)

        if last is None:
            now = RandomState.capture(problem.generators)
            evaluation = self.evaluation(name, batches, random_states=(now,) * len(batches))
        else:
            evaluation = self.evaluation(name, batches, random_states=last.random_states)
            evaluation = evaluation.with_changes(modes=last.modes)
        if begun is not None:
            evaluation = begun if last is not None else _on(begun, evaluation)
        history.checks.examine_before_updates(evaluation)
        return Stationary(
            name=name,
            engine=engine,
            value=dict(problem.parameters) if begun is None else begun.parameters,
            evaluation=evaluation,
            memory=history.memory[name],
            residual=None if problem.after_step is None else ProjectedStep.of(problem),
            graph=None if begun is None else history.kept_graphs.get(name),
            simultaneous=history.simultaneous,
            estimates=history.estimates.get(name),
            fresh=tuple([_with_batches(evaluation, group) for group in fresh]),
            learning_rates=history.learning_rates.get(name) or _learning_rates(problem),
        )

    def _solve_batches(self, name: str, groups: int) -> list[tuple[Any, ...]]:
        """That many groups of `solve_batches` batches from the data of a problem's solves."""
        # Fresh batches; a question only looks at them, and the next solve uses them.
        self._draws += 1
        stream, size = (
            self._history.solve_streams[name],
            self._history.graph.problems[name].solve_batches,
        )
        if self._asking:
            batches = stream.peek(groups * size)
        else:
            taken = stream.take(groups * size)
            self._history.taken_for_solves.append((stream, taken))
            batches = taken.batches
        return [batches[start : start + size] for start in range(0, len(batches), size)]

    def _as_it_began(self, name: str) -> Evaluation | None:
        """Where a problem stood when the simultaneous round began, if it has moved in it."""
        history = self._history
        if not history.simultaneous or self._asking:
            return None
        # (An update that was left out has moved nothing.)
        return self._last(name) if history.last_round.get(name) == history.round else None

    def _stepped(self, name: str, engine: StepEngine) -> Stepped:
        """The solution of a problem that has not moved yet, or moves later: one step, on copies."""
        problem = self._history.graph.problems[name]
        self._draws += 1
        keeps = bool(self._history.keeps_graph[name])
        found = self.differentiate(name, self.batches(name), keep_graph=keeps)
        self._history.note_graph(name, found)
        # With all of the optimizers' state, whatever the engine needs, because the step is made
        # here.
        step = OptimizerStep.capture(problem, unused=found.unused)
        before = {key: parameter.detach() for key, parameter in problem.parameters.items()}
        reads = found.evaluation.current_reads()
        after = found.evaluation.stepped(step, before, found.gradient, reads)
        return Stepped(
            name=name,
            engine=engine,
            value={key: value.detach() for key, value in after.items()},
            evaluation=found.evaluation,
            step=step,
            gradient=found.gradient,
            graph=found.graph,
            history=(RecordedStep(evaluation=found.evaluation, step=step),),
            memory=self._history.memory[name],
        )

    # ------------------------------ evaluations

    def differentiate(
        self,
        name: str,
        batches: tuple[Any, ...],
        *,
        is_update: bool = False,
        players: Collection[str] | None = None,
        keep_graph: bool = False,
        held_constant: frozenset[str] = frozenset(),
        begun: RandomState | None = None,
    ) -> TotalGradient:
        """The total gradient of a problem's loss at its current parameters.

        Args:
            name: the problem.
            batches: its batches.
            is_update: whether the problem moves with this gradient, or the gradient is only a
                question.
            players: the players that move; None: all.
            keep_graph: whether the gradient's graph is kept.
            held_constant: problems whose solutions are treated as constants.
            begun: the random state now, where it is known.

        Raises:
            NotCountable: for a first update that succeeds if it is repeated.
            ProblemError: under `torch.inference_mode()`.
        """
        history, problem = self._history, self._history.graph.problems[name]
        if torch.is_inference_mode_enabled():
            raise ProblemError(
                f"The gradient of problem {name!r} cannot be taken under torch.inference_mode(), "
                "because nothing has a gradient there. Leave that mode for this call."
            )
        draws = self._draws
        # A step that is made and differentiated later needs what the parameters were before it.
        stays = history.step_engines[name] is None and not history.simultaneous
        moves = is_update and not stays
        if is_update and history.solved[name]:
            history.learning_rates[name] = _learning_rates(problem)
        evaluation = self.evaluation(name, batches, parameters_move=moves)

        # Hooks see the total gradient, once it is complete. Autograd would call them for the direct
        # and the implicit term separately.
        hooks: dict[str, dict[int, Any]] = {}
        if name in history.differentiated:
            for key, parameter in problem.parameters.items():
                if parameter._backward_hooks:
                    hooks[key] = parameter._backward_hooks
        # (Of a game whose players take turns, every turn.)
        turns = history.updates[name] // len(problem.player_moves)
        checked = is_update and is_power_of_two(turns + 1)
        examine, saved = history.checks.examine(name, again=checked), None
        if examine is not None:
            examine = evaluation.apart(examine)
        if is_update and history.keeps_graph[name] is None:
            saved = SavedBytes([*problem.parameters.values(), *tensors_of(batches)])
            examine = None if examine is None else saved.apart(examine)
        gradient_of = total_gradient if saved is None else saved.counted(total_gradient)
        whole = players is None or len(players) == len(problem.players)
        flow = Flow() if is_update and whole and name in history.zero_terms else None
        try:
            if hooks:
                _let_hooks_rest(problem, hooks)
            found = gradient_of(
                evaluation,
                is_update=is_update,
                examine=examine,
                displaced=examine is not None and name in history.checks.displaced,
                linked=name in history.checks.pending and name in history.checks.twice,
                players=players,
                keep_graph=keep_graph,
                held_constant=held_constant,
                estimates=history.estimates.get(name),
                # (Looking for solutions may have evaluated other losses, which draw numbers.)
                begun=begun if self._draws == draws else None,
                flow=flow,
            )
            if checked:
                self._check_stand_ins(found.evaluation)
            if examine is not None:
                history.checks.check_functions(found.evaluation)
        except BaseException as error:
            # An update is made completely or not at all. A question has worked on copies.
            if is_update:
                restore_buffers(evaluation)
            if saved is not None and refuses_counting(error):
                history.keeps_graph[name] = False  # what cannot be counted might not fit
                raise NotCountable from error
            explain_third_derivative(error, evaluation)
            explain_frozen(error, list(evaluation.solutions) or [name])
            raise
        finally:
            for key, own in hooks.items():
                problem.parameters[key]._backward_hooks = own

        if saved is not None:
            history.note_saved(name, saved.total)
        if hooks:
            gradient = history.checks.call_hooks(name, hooks, found.gradient)
            found = replace(found, gradient=gradient)
        # The checks on the first batch are done once they have seen every player.
        if whole:
            history.checks.pending.pop(name, None)
        if flow is not None and found.has_derivative:
            history.zero_terms.look(found.evaluation, flow)
        if not found.has_derivative and not held_constant:
            resting = [other for other in history.graph.problems if history.rests(other)]
            history.checks.explain_zero(name, resting)
        return found

    def evaluation(
        self,
        name: str,
        batches: tuple[Any, ...],
        *,
        random_states: tuple[RandomState, ...] = (),
        parameters_move: bool = False,
    ) -> Evaluation:
        """Describes an evaluation of a problem's loss at its current parameters.

        Args:
            name: the problem.
            batches: its batches.
            random_states: the random state before each, where they are known.
            parameters_move: whether the live parameters will move while the evaluation is needed.
        """
        graph, loss = self._history.graph, self._history.losses[name]
        problem = graph.problems[name]
        # An engine of several steps needs what was read at each of them, which moves meanwhile. For
        # one step the order of a round sees to it (see `DependencyGraph.level`).
        outlives = parameters_move and self._by_steps[name] > 1
        solutions: dict[str, Solution] = {}
        for lower in graph.solutions_in[name]:
            solution = self.find(lower)
            if outlives:
                solution = replace(solution, value=_held(solution.value, copy=True))
            solutions[lower] = solution
        # Copies only where they are needed: implicit engines differentiate where the parameters
        # stand, and a question is over before anything moves.
        values: dict[str, Tensors] = {}
        for other in graph.values_in[name]:
            values[other] = _held(graph.problems[other].parameters, copy=parameters_move)
        return Evaluation(
            loss=loss,
            parameters=_held(problem.parameters, copy=parameters_move),
            batches=batches,
            random_states=random_states,
            versions=_versions(batches),
            modes=loss.modes,
            buffers=self._copied_buffers(name),
            values=values,
            solutions=solutions,
            dependent=graph.solutions_depending_on[name],
            made=self._history.updates[name],
            function=problem.loss,
        )

    def _check_stand_ins(self, evaluation: Evaluation) -> None:
        """Checks, at the updates 1, 2, 4, 8, …, that stand-ins for parameters change no loss.

        A loss that no engine evaluates again may keep state. So it is evaluated once more in its
        first update alone.
        """
        history, loss = self._history, evaluation.loss
        name, problem = loss.problem.name, loss.problem
        if problem.device.type == "meta" or loss.sharded:
            return
        history.checks.check_optimizer_states(name)
        replayed = name in history.checks.displaced
        if loss.checks.was_dismissed("stand-ins") or not (replayed or loss.reads):
            return
        if not replayed:
            # In the last move of a game's first update all players take part. (An update that was
            # left out is made again.)
            first = history.updates[name] < len(problem.player_moves)
            whole = len(evaluation.value) == len(problem.players)
            if not (first and whole and loss.checks.is_due("stand-ins", once=True)):
                return
        # A compiled module that is evaluated at parameters of another kind may be compiled once
        # more, which takes longer than the check is worth.
        seen = [history.graph.problems[other] for other in self._seen[name]]
        if any(problem.runs_compiled for problem in seen):
            return
        live = evaluation.current_reads()
        for other in live:
            # Solutions may be elsewhere: one step ahead, or where a simultaneous round began.
            own: Tensors = dict(history.graph.problems[other].parameters)
            solution = evaluation.solutions.get(other)
            if solution is None or all(map(is_, solution.value.values(), own.values())):
                live[other] = own
        evaluation.check_stand_ins(live, replayed=replayed)

    def batches(self, name: str) -> tuple[Any, ...]:
        """The batches of the problem's last update, or those that it will draw next."""
        last = self._last(name)
        if last is not None:
            return last.batches
        self._draws += 1
        return self._history.streams[name].peek(self._history.graph.problems[name].accumulate)

    def _last(self, name: str) -> Evaluation | None:
        """The evaluation of the problem's last update, if this view looks at it."""
        return None if self._ahead else self._history.last.get(name)

    def _copied_buffers(self, name: str) -> dict[str, Tensors]:
        """Problem that a loss sees → copies of its buffers, and of frozen parameters like them."""
        copied: dict[str, Tensors] = {}
        frozen = self._frozen.get(name, {})
        if name not in self._history.differentiated and self._history.updates[name]:
            # Its first update alone is repeated, see `_check_stand_ins`. Those of other problems
            # still need copies: its loss runs their modules, which may move them (a momentum
            # encoder), and they move in their own problem's updates only.
            frozen = {other: tensors for other, tensors in frozen.items() if other != name}
        for other in self._seen[name]:
            live: Tensors = {}
            for prefix, registry in self._buffers[other]:
                for key, buffer in registry.items():
                    if buffer is not None:
                        live[prefix + key] = buffer
            live |= frozen.get(other, {})
            copied[other] = _held(live, copy=True) if live else live
        return copied


FROZEN_SHARE = 2
"""How many times the trainable parameters the frozen ones may be, to be recorded with each step."""

FEW_FROZEN = 1 << 16
"""A number of frozen parameters that is recorded in any case."""


def _frozen(problem: Problem) -> Tensors:
    """Name → the frozen parameters of a problem's module."""
    return {key: p for key, p in problem.module.named_parameters() if not p.requires_grad}


def _let_hooks_rest(problem: Problem, hooks: Mapping[str, dict[int, Any]]) -> None:
    """Takes the hooks off some parameters."""
    for key in hooks:
        problem.parameters[key]._backward_hooks = None


def _learning_rates(problem: Problem) -> tuple[float, ...]:
    """The learning rates of all groups of a problem's optimizers."""
    rates: list[float] = []
    for optimizer in problem.optimizers.values():
        # (Adafactor has None, where it finds its own rates.)
        given = [group.get("lr") for group in optimizer.param_groups]
        rates += [float(rate) for rate in given if rate is not None]
    return tuple(rates)


def _on(point: Evaluation, other: Evaluation) -> Evaluation:
    """An evaluation at one's point on the batches, with the noise, of another."""
    return point.with_changes(
        batches=other.batches,
        random_states=other.random_states,
        versions=other.versions,
        modes=other.modes,
    )


def _with_batches(evaluation: Evaluation, batches: tuple[Any, ...]) -> Evaluation:
    """The same evaluation on other batches, as many."""
    return evaluation.with_changes(batches=batches, versions=_versions(batches))


def _versions(batches: Sequence[Any]) -> tuple[tuple[int, ...] | None, ...]:
    if len(batches) == 1:
        return (None if batches[0] is None else versions_of(batches[0]),)
    return tuple([None if batch is None else versions_of(batch) for batch in batches])


def _held(parameters: Mapping[str, Tensor], *, copy: bool) -> Tensors:
    """Parameters as constants, and as copies if the live ones will move."""
    if copy:
        return dict(zip(parameters, copies(parameters.values()), strict=True))
    return dict(zip(parameters, map(Tensor.detach, parameters.values()), strict=True))
