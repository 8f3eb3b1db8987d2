"""Keeps track of the lower problems' solutions that losses read during a run.

`History` is what has happened: how often each problem moved, and what later gradients need of it.
`Levels` is a view of it, of which there are two. One gives the solutions as losses read them now.
The other gives them one step ahead, for problems that begin a round although others are below them.
Each view caches its own solutions.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from operator import is_
from typing import Any

import torch
from torch import Tensor

from mlo.averages import Averages
from mlo.batches import BatchStream, Taken
from mlo.check_schedule import is_power_of_two
from mlo.engine_checks import engine_advice
from mlo.errors import CheckpointWarning, ProblemError, warn_user
from mlo.estimators import Estimates
from mlo.gradient_paths import (
    differentiated_problems,
    differentiated_starts,
    estimates_total,
    why_graph_cannot_be_kept,
)
from mlo.graph import DependencyGraph
from mlo.graph_memory import NotCountable, SavedBytes, fits, refuses_counting
from mlo.hypergradient.first_order import FirstOrder
from mlo.hypergradient.products import Autograd, Engine
from mlo.loss import LossFunction, explain_frozen
from mlo.loss_checks import LossChecks, explain_third_derivative
from mlo.optimizer_step import OptimizerStep, StateKey
from mlo.problem import Problem, Tensors
from mlo.projected_step import ProjectedStep
from mlo.randomness import RandomState, preserved
from mlo.response import (
    AbstractEngine,
    Constant,
    Evaluation,
    GradientGraph,
    RecordedStep,
    Solution,
    Started,
    Stationary,
    StepEngine,
    Stepped,
)
from mlo.restart import Start
from mlo.solve_sums import SolveSums
from mlo.tensors import copies, tensors_of, versions_of
from mlo.total_gradient import Flow, TotalGradient, total_gradient
from mlo.zero_terms import ZeroTerms, watched_problems

__all__ = ["History", "Levels", "restore_buffers"]

End = tuple[Tensors, dict[StateKey, Tensor]]
"""Parameters and optimizer's state after a step."""


class History:
    """What has happened in a run, as far as later gradients need it.

    Args:
        graph: the problems.
        engines: problem → engine of its solution.
        losses: problem → its loss.
        streams: problem → its batches, which are looked at here and not used up.
        starts: problem → where it begins each block of its steps.
        looks_ahead: the problems that see lower solutions one step ahead.
        simultaneous: whether all problems see each other as they were when the round began.

    Attributes:
        round: number of rounds that were made.
        updates: problem → how often it moved.
        memory: problem → what its engine keeps from one solve to the next, name → tensor.
        differentiated: the problems whose solutions are differentiated.
        step_engines: problem → its engine, where later gradients differentiate steps of its
            optimizer; else None.
        solved: problem → whether its solution is taken for a stationary point.
        keeps_graph: problem → whether the gradient of its update is kept with its graph; None: its
            next update will tell.
        last: problem → the evaluation that its last update was made with.
        last_round: problem → the round of that update, counted from 0.
        zero_terms: looks whether gradients reach problems through solutions.
        solve_streams: problem → batches of its solves, where they have data of their own.
        taken_for_solves: what was taken from these in the update that is being made.
        stepped: problem → its solution, where the engine differentiates that update's step.
        graphs: graphs of gradients retained for later in the round, with the problem's name.
        estimates: problem → its estimator at work.
        averages: problem → the average of its iterates.
        kept_graphs: problem → the gradient of its last update with its graph, if it is kept.
        learning_rates: problem that is solved → those of its optimizers at its last update.
        sums: problem → its gradients of this update's solves so far (`accumulate_solves`).
        resumed: problems whose solutions lack the steps made before a state was loaded.
        loaded: whether a state was loaded, and no question was asked since.
        told: problems for which the warning about missing steps has been issued.
        generators: the random generators that the problems name.
        gpus: the indices of the GPUs that the problems are on.
    """

    def __init__(
        self,
        graph: DependencyGraph,
        engines: Mapping[str, AbstractEngine],
        losses: Mapping[str, LossFunction],
        streams: Mapping[str, BatchStream],
        *,
        starts: Mapping[str, Start] | None = None,
        looks_ahead: Collection[str] = (),
        simultaneous: bool = False,
    ) -> None:
        self.graph, self.engines, self.losses, self.streams = graph, engines, losses, streams
        self.starts = starts or {}
        self.looks_ahead, self.simultaneous = frozenset(looks_ahead), simultaneous
        for name, loss in losses.items():
            loss.advice = engine_advice(
                graph,
                engines,
                name,
                looks_ahead=looks_ahead,
                parallel=loss.parallel,
                simultaneous=simultaneous,
            )
        self.checks = LossChecks(
            graph, engines, {name: loss.advice for name, loss in losses.items()}
        )
        self.zero_terms = ZeroTerms(watched_problems(graph, engines))
        self.solve_streams: dict[str, BatchStream] = {}
        self.taken_for_solves: list[tuple[BatchStream, Taken]] = []
        for name, problem in graph.problems.items():
            if problem.solve_data is not None:
                self.solve_streams[name] = BatchStream(problem.solve_data, name)
        self.differentiated = differentiated_problems(graph, engines)
        self.keeps_graph = {name: self._keeps(name, losses) for name in graph.problems}
        self._undecided = {name for name, keeps in self.keeps_graph.items() if keeps is None}
        # Problem → whether products are taken through the graph of its update.
        self._shares_graph: dict[str, bool] = {}
        self.step_engines: dict[str, StepEngine | None] = {}
        self.solved: dict[str, bool] = {}
        for name in graph.problems:
            engine = engines[name]
            differentiated = name in self.differentiated
            steps = differentiated and isinstance(engine, StepEngine)
            self.step_engines[name] = engine if steps else None  # type: ignore[assignment]
            self.solved[name] = differentiated and not isinstance(engine, (StepEngine, FirstOrder))
            self._shares_graph[name] = self._shares(name)
        self._from_starts = differentiated_starts(graph, engines, self.starts)
        self.round = 0
        self.updates = dict.fromkeys(graph.problems, 0)
        self.memory: dict[str, dict[str, Tensor]] = {name: {} for name in graph.problems}
        self.last: dict[str, Evaluation] = {}
        self.last_round: dict[str, int] = {}
        self.stepped: dict[str, Stepped] = {}
        self.graphs: list[tuple[str, GradientGraph]] = []
        self.estimates: dict[str, Estimates] = {}
        for name, problem in graph.problems.items():
            if problem.estimator is not None:
                of_total = estimates_total(graph, engines, name)
                self.estimates[name] = Estimates(name, problem.estimator, of_total=of_total)
        self.averages: dict[str, Averages] = {}
        for name, problem in graph.problems.items():
            if problem.average is not None:
                self.averages[name] = Averages(problem.average)
        self.kept_graphs: dict[str, GradientGraph] = {}
        self.learning_rates: dict[str, tuple[float, ...]] = {}
        self.sums: dict[str, SolveSums] = {}
        self.resumed: set[str] = set()
        self.loaded = False
        self.told: set[str] = set()
        self._ends: dict[str, End] = {}
        # The problems whose chains of steps were cut, and those of which a warning has said so.
        self._cut: set[str] = set()
        self._warned_of_cut: set[str] = set()
        # The problems whose parameters, and recorded steps, stem from their starts.
        self._begun: set[str] = set()
        self._places: dict[str, tuple[tuple[int, int], ...]] = {}
        self.generators: list[torch.Generator] = []
        self.gpus: list[int] = []
        for problem in graph.problems.values():
            self.generators += problem.generators
            gpu = problem.device.index if problem.device.type == "cuda" else None
            if gpu is not None and gpu not in self.gpus:
                self.gpus.append(gpu)

    def with_engines(self, engines: Mapping[str, AbstractEngine]) -> History:
        """What has happened, for other engines: all but their steps.

        The batches are the same streams and must not be used up. An unchanged engine has a copy of
        its memory; another engine has none.
        """
        other = History(
            self.graph,
            engines,
            self.losses,
            self.streams,
            starts=self.starts,
            looks_ahead=self.looks_ahead,
            simultaneous=self.simultaneous,
        )
        other.solve_streams, other.learning_rates = self.solve_streams, dict(self.learning_rates)
        other.round, other.updates = self.round, dict(self.updates)
        other.last, other.last_round = dict(self.last), dict(self.last_round)
        other._begun, other._places = set(self._begun), dict(self._places)
        for name, kept in self.memory.items():
            if engines[name] == self.engines[name]:
                other.memory[name].update(kept)
        # What an estimator has seen is useful if it estimates the same quantities.
        for name, estimates in self.estimates.items():
            if other.estimates[name].of_total == estimates.of_total:
                other.estimates[name] = estimates
        return other

    # ------------------------------ what an update leaves

    def rests(self, name: str) -> bool:
        """Whether a problem does not move in this round (`warmup_steps`)."""
        return self.round < self.graph.problems[name].warmup_steps

    def restart(self, name: str) -> None:
        """Restarts a problem (`restart_from`), and with it the chain of its steps."""
        self.starts[name].put(self.graph.problems[name])
        for kept in (self.stepped, self._ends):
            kept.pop(name, None)
        self.note_begun(name)

    def note_begun(self, name: str) -> None:
        """Notes that a problem's current parameters stem from its start."""
        self._begun.add(name)
        self.mark(name)

    def start_of(self, name: str) -> Start:
        """Where the problem's parameters started.

        Raises:
            ProblemError: if they did not start there: no step was made yet, or they were set since.
        """
        start = self.starts[name]
        if name in self._begun and not self._was_set(name):
            return start
        raise ProblemError(
            f"Problem {name!r} starts each round from the value of {start.problem!r}, but its "
            "current parameters do not stem from there: it has not moved yet, or its parameters "
            "were set from outside since. Request this gradient after a round (`step()`, "
            "`updates()`)."
        )

    def note(self, name: str, found: TotalGradient, step: OptimizerStep | None) -> None:
        """Records an update: where it was made, and its step, if a later gradient needs it."""
        # Where it was made is noted of every problem: `gradient` and implicit engines evaluate the
        # loss again on the batches and with the noise of the last update.
        self.last[name], self.last_round[name] = found.evaluation, self.round
        engine = self.step_engines[name]
        if engine is None and found.graph is not None:
            self.kept_graphs[name] = found.graph
            self.note_graph(name, found)
        if step is None or engine is None:
            return
        self.note_graph(name, found)

        # The new solution, with the last steps that its engine differentiates, this one included.
        recorded = RecordedStep(evaluation=found.evaluation, step=step)
        earlier = self.stepped[name].history if name in self.stepped else ()
        steps = engine.recorded_steps
        if steps > 1:
            # Steps form a chain only if each starts from the previous one's result.
            if not self._ends_at(name, recorded) and earlier:
                earlier = ()
                self._begun.discard(name)
                self._cut.add(name)
            self._ends[name] = _copied_end(self.graph.problems[name])
        chain = (*earlier, recorded)
        if len(chain) > steps:
            # Where it is cut it starts at constants.
            chain = chain[-steps:]
            self._begun.discard(name)
        self.stepped[name] = Stepped(
            name=name,
            engine=engine,
            value=dict(self.graph.problems[name].parameters),
            evaluation=found.evaluation,
            step=step,
            gradient=found.gradient,
            graph=found.graph,
            history=chain,
            memory=self.memory[name],
            start=self.starts[name] if name in self._begun else None,
        )

    def mark(self, name: str) -> None:
        """Notes where the problem's parameters are, to detect later changes from outside."""
        if self.step_engines[name] is not None or name in self.starts:
            self._places[name] = _places_of(self.graph.problems[name])

    def last_step(self, name: str) -> Stepped | None:
        """The solution that the problem's last step made, if its parameters have not changed since.

        Weights that were reset, loaded or clamped are not a result of that step.

        Raises:
            ProblemError: if its steps should start from a value from above, and do not.
        """
        stepped = self.stepped.get(name)
        if stepped is not None and stepped.start is None and name in self._from_starts:
            self.start_of(name)  # which says that the chain of its steps was broken
        return None if stepped is None or self._was_set(name) else stepped

    def _was_set(self, name: str) -> bool:
        """Whether the problem's parameters were set from outside since its last step."""
        # By their values, where copies are kept for chains of steps; otherwise by the versions of
        # the tensors, which every change in place raises (but for those of .data and numpy).
        problem = self.graph.problems[name]
        if name not in self._ends:
            return self._places.get(name) != _places_of(problem)
        kept = self._ends[name][0]
        return not all(torch.equal(kept[key], p) for key, p in problem.parameters.items())

    def _ends_at(self, name: str, recorded: RecordedStep) -> bool:
        """Whether a step starts where the previous one ended, with the same optimizer state."""
        # Bit for bit: something moved parameters or state between the two steps, or nothing did.
        if name not in self._ends:
            return False
        parameters, state = self._ends.pop(name)
        begun = recorded.step.differentiable_state()
        return (
            parameters.keys() == recorded.evaluation.parameters.keys()
            and state.keys() == begun.keys()
            and all(map(torch.equal, parameters.values(), recorded.evaluation.parameters.values()))
            and all(torch.equal(state[key], begun[key]) for key in state)
        )

    def forget(self) -> None:
        """Forgets all updates that were made, because the problems have been moved."""
        self.release_graphs(later=())
        self.last, self.stepped, self._ends, self._places = {}, {}, {}, {}
        self.learning_rates = {}
        self._begun = {name for name in self.starts if self.updates[name] > 0}
        for name in self._begun:
            self.mark(name)

    def step_needed(self, name: str, later: Sequence[str]) -> bool:
        """Whether updates that come `later` in the round differentiate a problem's last step.

        Or, of an implicit engine, whether they solve on the batches of that step.
        """
        engine = self.step_engines[name]
        if engine is None and not self.solved[name]:
            return False
        left = 1 if engine is None else engine.recorded_steps  # of its steps, until it is replaced
        for other in later:
            if other == name:
                left -= 1
                if left == 0:
                    return False
            elif name in self.graph.solutions_depending_on[other] and other not in self.looks_ahead:
                return True
        return False

    def warn_of_other_batches(self, name: str, evaluation: Evaluation) -> None:
        """Warns, once after a load, of a gradient that differs from that before the save.

        Args:
            name: the problem.
            evaluation: of its gradient.
        """
        unmoved = []
        for other in (*evaluation.dependent, name):
            problem = self.graph.problems[other]
            if other in self.last or self.rests(other) or not self.updates[other]:
                continue
            differs = self.solved[other] or self.step_engines[other] is not None
            if differs or problem.data is not None:
                unmoved.append(other)
        if not unmoved:
            return
        self.loaded = False
        warn_user(
            f"No step of {', '.join(sorted(unmoved))} was made since the state was loaded, which "
            "holds no steps. So this gradient is taken on the next batches, and one step ahead "
            "where an engine differentiates steps. It differs from the one before the state was "
            "saved. Call optimizer.step() first.",
            CheckpointWarning,
        )

    def warn_of_missing_steps(self, name: str, solution: Stepped | Started) -> None:
        """Warns, once after a load, of a gradient through fewer steps than requested."""
        engine = self.step_engines[name]
        if name not in self.resumed or engine is None:
            return
        self.resumed.discard(name)  # said once, whether there is anything to say or not
        self._warn_of_fewer_steps(
            name,
            engine,
            solution,
            "a state holds no steps, and no more were made since it was loaded.",
        )

    def warn_of_no_steps(self, name: str, solution: Stepped | Started) -> None:
        """Warns, once per problem, of an engine of several steps where no step is recorded."""
        engine = self.step_engines[name]
        if name in self.told or engine is None:
            return
        self.told.add(name)
        seen = "one step ahead" if isinstance(solution, Stepped) else "where it starts"
        self._warn_of_fewer_steps(
            name,
            engine,
            solution,
            f"none of its steps is recorded, so it is seen {seen}. Rounds record the steps that "
            "they make: call optimizer.step() first.",
        )

    def warn_of_cut_chain(self, name: str, solution: Stepped) -> None:
        """Warns, once per problem, of a gradient that leaves out steps of its block.

        A change before the block ends the chain on purpose, as at the start of another task.
        """
        engine = self.step_engines[name]
        if name not in self._cut or name in self._warned_of_cut or engine is None:
            return
        self._cut.discard(name)
        if len(solution.history) >= min(engine.recorded_steps, self.graph.problems[name].steps):
            return
        warned = self._warn_of_fewer_steps(
            name,
            engine,
            solution,
            "its parameters or its optimizer's state were changed between two of them, and those "
            "before the change count as constants. Make the change part of the loss, of the "
            "optimizer or of after_step=, or make it between rounds.",
        )
        if warned:
            self._warned_of_cut.add(name)

    def _warn_of_fewer_steps(
        self, name: str, engine: StepEngine, solution: Stepped | Started, why: str
    ) -> bool:
        made = len(solution.history) if isinstance(solution, Stepped) else 0
        asked = engine.recorded_steps
        if name in self.starts:
            asked = min(asked, self.graph.problems[name].steps)
        if made < asked:
            warn_user(
                f"A gradient goes through {made} of the {asked} steps that the engine "
                f"{engine.label!r} of problem {name!r} differentiates: {why}"
            )
        return made < asked

    # ------------------------------ graphs that are kept for later in the round

    def _keeps(self, name: str, losses: Mapping[str, LossFunction]) -> bool | None:
        engine = self.engines[name]
        if name not in self.differentiated or not isinstance(engine, StepEngine):
            return False
        if engine.keeps_graph != "auto":
            return engine.keeps_graph
        several = why_graph_cannot_be_kept(self.graph, self.engines, name, losses[name].parallel)
        return False if several else None

    def graph_decision(self, name: str) -> bool | None:
        """Whether a problem's graphs are kept, as the first update decided; None before that."""
        # A kept graph rounds differently from one that is made again. So a resumed run must not
        # decide again.
        return self.keeps_graph[name] if name in self._undecided else None

    def restore_graph_decision(self, name: str, keeps: bool | None) -> None:
        """Restores a saved decision; None: the next update decides."""
        if name in self._undecided:
            self.keeps_graph[name] = keeps

    def note_saved(self, name: str, saved: float) -> None:
        """Decides whether graphs are kept, from the bytes that a forward pass saves."""
        self.keeps_graph[name] = fits(saved, self.graph.problems[name].device)

    def graph_needed_later(self, name: str, later: Sequence[str]) -> bool:
        """Whether an update `later` in the round differentiates the step that is made now."""
        if not self.keeps_graph[name] and not self._shares_graph[name]:
            return False
        # This problem's own next update makes a new solution: only readers before that count.
        for other in later:
            if other == name:
                return False
            depends = name in self.graph.solutions_depending_on[other]
            if depends and other not in self.looks_ahead:
                return True
        return False

    def _shares(self, name: str) -> bool:
        """Whether products use the update's own graph, made at the same point."""
        engine, problem = self.engines[name], self.graph.problems[name]
        return (
            self.simultaneous
            and name in self.differentiated
            and isinstance(engine, Engine)
            and isinstance(engine.products, Autograd)
            and problem.solve_data is None
            and problem.accumulate == 1
            and not self.graph.solutions_in[name]
            and self.losses[name].parallel is None
        )

    def note_graph(self, name: str, found: TotalGradient) -> None:
        """Notes that the graph of a gradient is retained, so that it is released in time."""
        if found.graph is not None:
            self.graphs.append((name, found.graph))

    def release_graphs(self, later: Sequence[str]) -> None:
        """Releases the graphs that no update that comes `later` in the round needs."""
        needed = []
        for name, graph in self.graphs:
            if self.graph_needed_later(name, later):
                needed.append((name, graph))
            else:
                graph.release()
                self.kept_graphs.pop(name, None)
        self.graphs = needed

    # ------------------------------ engines' memory

    def copied_memory(self) -> dict[str, dict[str, Tensor]]:
        """The engines' memory as it is, for `restore_memory`."""
        # A shallow copy: its tensors are replaced, never changed in place.
        copied = {}
        for name, kept in self.memory.items():
            if kept:
                copied[name] = kept.copy()
        return copied

    def restore_memory(self, memory: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restores the engines' memory."""
        for name, kept in self.memory.items():
            kept.clear()
            kept.update(memory.get(name, {}))
        for estimates in self.estimates.values():
            estimates.memory.discard()

    def keep(self, name: str) -> None:
        """Keeps what estimators have seen, and averages, after an update of a problem."""
        for estimates in self.estimates.values():
            estimates.memory.commit()
        if name in self.averages:
            self.averages[name].take(self.graph.problems[name].parameters)


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
        for name in history.differentiated:
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
        """
        history, problem = self._history, self._history.graph.problems[name]
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
        checked = is_update and is_power_of_two(history.updates[name] + 1)
        examine, saved = history.checks.examine(name, again=checked), None
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
        """Checks, at the updates 1, 2, 4, 8, …, that stand-ins for parameters change no loss."""
        history, loss = self._history, evaluation.loss
        name = loss.problem.name
        if loss.problem.device.type == "meta" or loss.sharded:
            return
        history.checks.check_optimizer_states(name)
        # A compiled module that is evaluated at parameters of another kind may be compiled once
        # more, which takes longer than the check is worth.
        seen = [history.graph.problems[other] for other in self._seen[name]]
        if any(problem.runs_compiled for problem in seen):
            return
        if name in history.checks.displaced or loss.reads:
            live = evaluation.current_reads()
            for other in live:
                # Solutions may be elsewhere: one step ahead, or where a simultaneous round began.
                own: Tensors = dict(history.graph.problems[other].parameters)
                solution = evaluation.solutions.get(other)
                if solution is None or all(map(is_, solution.value.values(), own.values())):
                    live[other] = own
            evaluation.check_stand_ins(live)

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
        frozen = self._frozen.get(name)
        for other in self._seen[name]:
            live: Tensors = {}
            for prefix, registry in self._buffers[other]:
                for key, buffer in registry.items():
                    if buffer is not None:
                        live[prefix + key] = buffer
            if frozen and other in frozen:
                live |= frozen[other]
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


@torch.no_grad()
def restore_buffers(evaluation: Evaluation) -> None:
    """Restores the problem's buffers to their values before an evaluation.

    A buffer that the evaluation has made itself (a cached mask) stays. Frozen parameters are
    restored where they were recorded.
    """
    problem = evaluation.loss.problem
    recorded = evaluation.buffers[problem.name]
    for prefix, module in problem.module.named_modules():
        for key, buffer in module._buffers.items():
            before = recorded.get(f"{prefix}.{key}" if prefix else key)
            if before is None:
                continue
            # A buffer may be exchanged for another one (a queue that grows).
            if buffer is not None and buffer.shape == before.shape:
                buffer.copy_(before)
            else:
                module._buffers[key] = before.clone()
    for key, parameter in problem.module.named_parameters():
        if key in recorded:
            parameter.copy_(recorded[key])


def _learning_rates(problem: Problem) -> tuple[float, ...]:
    """The learning rates of all groups of a problem's optimizers."""
    rates: list[float] = []
    for optimizer in problem.optimizers.values():
        rates += [float(group["lr"]) for group in optimizer.param_groups if "lr" in group]
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


def _copied_end(problem: Problem) -> End:
    state = OptimizerStep.capture(problem).differentiable_state()
    return _held(problem.parameters, copy=True), state


def _places_of(problem: Problem) -> tuple[tuple[int, int], ...]:
    """Memory and in-place version of every parameter."""
    return tuple([(p.data_ptr(), p._version) for p in problem.parameters.values()])


def _held(parameters: Mapping[str, Tensor], *, copy: bool) -> Tensors:
    """Parameters as constants, and as copies if the live ones will move."""
    if copy:
        return dict(zip(parameters, copies(parameters.values()), strict=True))
    return dict(zip(parameters, map(Tensor.detach, parameters.values()), strict=True))
