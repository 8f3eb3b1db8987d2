"""What losses are evaluated at, and the solutions of lower problems that they read, as they stand
in the course of a run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from mlo.batches import BatchStream
from mlo.containers import versions_of
from mlo.distributed import DataParallel
from mlo.evaluation import Evaluation, GradientGraph, LossModule
from mlo.graph import DependencyGraph
from mlo.hypergradient.base import Engine
from mlo.hypergradient.first_order import FirstOrder
from mlo.hypergradient.optimizer_step import OptimizerStep
from mlo.randomness import RandomState
from mlo.response import RecordedStep, Solution
from mlo.total_gradient import TotalGradient

__all__ = ["Solutions"]


class Solutions:
    """Finds the solution of a lower problem as a loss reads it now, and describes the evaluation of
    a loss that reads it.

    Args:
        graph: the problems.
        engines: problem → engine of its solution.
        modules: problem → its loss as a module.
        streams: problem → its batches, which are looked at but not taken.
        parallel: the processes that share batches.
        looks_ahead: the problems that see solutions as they will be.
        rests: whether a problem rests in this round (`warmup_steps`).
        total_gradient: (problem, its batches, whether it looks ahead) → its total gradient, in
            which nothing moves.

    Attributes:
        updates: problem → how often it moved.
        memory: problem → what its engine keeps from one solve to the next, name → tensor.
        differentiated: the problems whose responses are differentiated.
    """

    def __init__(
        self,
        graph: DependencyGraph,
        engines: Mapping[str, Engine],
        modules: Mapping[str, LossModule],
        streams: Mapping[str, BatchStream],
        *,
        parallel: DataParallel | None,
        looks_ahead: frozenset[str],
        rests: Callable[[str], bool],
        total_gradient: Callable[[str, tuple[Any, ...], bool], TotalGradient],
    ) -> None:
        self.graph = graph
        self.engines = engines
        self.updates = dict.fromkeys(graph.problems, 0)
        self.memory: dict[str, dict[str, Tensor]] = {name: {} for name in graph.problems}
        self.differentiated = frozenset(
            lower
            for name in graph.problems
            for lower in graph.responses(name)
            if not engines[lower].drops_implicit_term
        )
        self._problems = graph.problems
        self._modules, self._streams, self._parallel = modules, streams, parallel
        self._looks_ahead, self._rests, self._total_gradient = looks_ahead, rests, total_gradient
        self._dependent = {name: graph.dependent(name) for name in graph.problems}
        self._dependencies: dict[str, frozenset[str]] = {}
        for name in graph.problems:
            own = frozenset({name, *graph.upper(name)})
            self._dependencies[name] = own.union(
                *(self._dependencies[lower] for lower in graph.lower(name))
            )
        # Walking through the modules at every update would take longer than copying their buffers.
        self._buffers = {
            name: [
                (f"{prefix}." if prefix else "", m._buffers)
                for prefix, m in problem.module.named_modules()
            ]
            for name, problem in graph.problems.items()
        }
        # The evaluation of each problem's last update, its solution where the engine differentiates
        # that update, and other solutions with the state of the updates that they were made at.
        self._current: dict[str, Evaluation] = {}
        self._steps: dict[str, Solution] = {}
        self._known: dict[tuple[str, bool], tuple[tuple[int, ...], Solution]] = {}
        self._graphs: list[
            tuple[str, GradientGraph]
        ] = []  # those of solutions, with the problem's name

    # ------------------------------ the course of a run

    def keeps_step(self, name: str) -> bool:
        """Whether a later gradient differentiates the step of the problem's update."""
        return name in self.differentiated and self.engines[name].differentiates_step

    def keeps_graph(self, name: str, later: Sequence[str]) -> bool:
        """Whether one of the updates that come `later` in the round differentiates the problem's
        step as it was made now.
        """
        if not (self.keeps_step(name) and self.engines[name].keeps_graph):
            return False
        for other in later:
            if other == name:
                return False
            if name in self._dependent[other] and other not in self._looks_ahead:
                return True
        return False

    def release_graphs(self, later: Sequence[str]) -> None:
        """Lets go of the graphs that no update that comes `later` in the round needs."""
        needed = []
        for name, graph in self._graphs:
            if self.keeps_graph(name, later):
                needed.append((name, graph))
            else:
                graph.release()
        self._graphs = needed

    def record(self, name: str, found: TotalGradient, step: OptimizerStep | None) -> None:
        """Notes an update of a problem: where it was made, and the step, if a later gradient
        differentiates it.
        """
        self._current[name] = found.evaluation
        if step is None:
            return
        self._note_graph(name, found)
        recorded = RecordedStep(evaluation=found.evaluation, step=step)
        earlier = self._steps[name].history if name in self._steps else ()
        self._steps[name] = Solution(
            name=name,
            engine=self.engines[name],
            value=dict(self._problems[name].parameters),
            evaluation=found.evaluation,
            step=step,
            gradient=found.gradient,
            graph=found.graph,
            history=(*earlier, recorded)[-self.engines[name].recorded_steps :],
            memory=self.memory[name],
        )

    def _note_graph(self, name: str, found: TotalGradient) -> None:
        if found.graph is not None:
            self._graphs.append((name, found.graph))

    def forget(self) -> None:
        """Lets go of all updates that were made: the problems stand elsewhere now."""
        self.release_graphs(later=())
        self._current, self._steps, self._known = {}, {}, {}

    def forget_looks_ahead(self) -> None:
        """Lets go of solutions that are not those of updates: the batches that come next are
        others.
        """
        self._known.clear()

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Runs the body and leaves everything as it was."""
        known, memory, graphs = dict(self._known), self.copied_memory(), list(self._graphs)
        try:
            yield
        finally:
            self._known, self._graphs = known, graphs
            self.recall(memory)

    def copied_memory(self) -> dict[str, dict[str, Tensor]]:
        """The engines' memory as it is, for `recall`."""
        return {
            name: dict(kept) for name, kept in self.memory.items()
        }  # its tensors are replaced, never changed

    def recall(self, memory: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Puts the engines' memory back."""
        for name, kept in self.memory.items():
            kept.clear()
            kept.update(memory[name])

    # ------------------------------ solutions and evaluations

    def find(self, name: str, *, ahead: bool) -> Solution:
        """The problem's solution as those above it see it now, or, where they look ahead, as it
        will be.
        """
        engine = self.engines[name]
        rests = self._rests(name)
        if engine.differentiates_step and name in self._steps and not rests and not ahead:
            return self._steps[name]
        # Made once, and again only after something that it depends on has moved.
        stamp = (int(rests), *(self.updates[other] for other in sorted(self._dependencies[name])))
        known = self._known.get((name, ahead))
        if known is None or known[0] != stamp:
            if rests or engine.drops_implicit_term:
                solution = self._constant(name)
            else:
                look = self._look_ahead if engine.differentiates_step else self._stationary
                solution = look(name, ahead=ahead)
            known = self._known[name, ahead] = (stamp, solution)
        return known[1]

    def _constant(self, name: str) -> Solution:
        """The current parameters as a constant: of a problem that rests, or whose derivative is
        dropped.
        """
        problem = self._problems[name]
        evaluation = Evaluation(
            problem=problem, module=self._modules[name], reads=(), parameters={}, batches=(), random_states=(),
            modes=(), versions=(), buffers={}, uppers={},
        )  # fmt: skip
        return Solution(
            name=name, engine=FirstOrder(), value=dict(problem.parameters), evaluation=evaluation
        )

    def _stationary(self, name: str, *, ahead: bool) -> Solution:
        """The current parameters as a solution of the problem's stationarity condition, at its
        current or next batches.
        """
        current = None if ahead else self._current.get(name)
        batches = self.batches(name, ahead=ahead)
        now = RandomState.capture(self._problems[name].generators)
        states = current.random_states if current is not None else (now,) * len(batches)
        evaluation = self.evaluation(name, batches, states=states, copy=False, ahead=ahead)
        if current is not None:
            evaluation = replace(evaluation, modes=current.modes)
        return Solution(
            name=name,
            engine=self.engines[name],
            value=dict(self._problems[name].parameters),
            evaluation=evaluation,
            memory=self.memory[name],
        )

    def _look_ahead(self, name: str, *, ahead: bool) -> Solution:
        """The solution of a problem that has not moved yet, or moves later: one step of its
        optimizer, made on copies.
        """
        problem = self._problems[name]
        found = self._total_gradient(name, self.batches(name, ahead=ahead), ahead)
        self._note_graph(name, found)
        step = OptimizerStep.capture(problem)
        before = {key: parameter.detach() for key, parameter in problem.parameters.items()}
        after = step.apply(before, found.gradient)
        return Solution(
            name=name,
            engine=self.engines[name],
            value={key: value.detach() for key, value in after.items()},
            evaluation=found.evaluation,
            step=step,
            gradient=found.gradient,
            graph=found.graph,
            history=(RecordedStep(evaluation=found.evaluation, step=step),),
            memory=self.memory[name],
        )

    def evaluation(
        self,
        name: str,
        batches: tuple[Any, ...],
        *,
        states: tuple[RandomState, ...],
        copy: bool,
        ahead: bool,
    ) -> Evaluation:
        """Describes an evaluation of a problem's loss at its current parameters.

        Args:
            name: the problem.
            batches: its batches.
            states: the random state before each.
            copy: whether the live parameters will move while the evaluation is still needed.
            ahead: whether it looks ahead at the solutions that it reads.
        """
        problem = self._problems[name]
        keeps_many = copy and self.engines[name].recorded_steps > 1

        def held(tensor: Tensor) -> Tensor:
            return tensor.detach().clone() if copy else tensor.detach()

        return Evaluation(
            problem=problem,
            module=self._modules[name],
            reads=self.graph.reads[name],
            parameters={key: held(parameter) for key, parameter in problem.parameters.items()},
            batches=batches,
            random_states=states,
            modes=self._modules[name].modes,
            versions=tuple(map(versions_of, batches)),
            buffers={
                other: {
                    prefix + key: buffer.detach().clone()
                    for prefix, registry in self._buffers[other]
                    for key, buffer in registry.items()
                    if buffer is not None
                }
                for other in (name, *self.graph.reads[name])
            },
            uppers={
                other: {
                    key: held(parameter)
                    for key, parameter in self._problems[other].parameters.items()
                }
                for other in self.graph.values(name)
            },
            lowers={
                lower: self._frozen(solution) if keeps_many else solution
                for lower in self.graph.responses(name)
                for solution in (self.find(lower, ahead=ahead),)
            },
            dependent=self._dependent[name],
            parallel=self._parallel,
        )

    @staticmethod
    def _frozen(solution: Solution) -> Solution:
        """A solution with a copy of its value, for records that outlive the next move of its
        problem.
        """
        return replace(
            solution, value={key: tensor.detach().clone() for key, tensor in solution.value.items()}
        )

    def batches(self, name: str, *, ahead: bool = False) -> tuple[Any, ...]:
        """The batches of the problem's last update; before the first, or where asked for, those
        that it will draw next.
        """
        current = None if ahead else self._current.get(name)
        return (
            current.batches
            if current is not None
            else self._streams[name].peek(self._problems[name].accumulate)
        )
