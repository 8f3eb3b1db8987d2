"""What has happened in a run, as far as later gradients need it: `History`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from mlo.averages import Averages
from mlo.batches import BatchStream, Taken
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
from mlo.graph_memory import fits
from mlo.hypergradient.first_order import FirstOrder
from mlo.hypergradient.products import Autograd, Engine
from mlo.loss import LossFunction
from mlo.loss_checks import LossChecks
from mlo.optimizer_step import OptimizerStep, StateKey
from mlo.problem import Problem, Tensors
from mlo.restart import Start
from mlo.solution import (
    AbstractEngine,
    Evaluation,
    GradientGraph,
    RecordedStep,
    Started,
    StepEngine,
    Stepped,
)
from mlo.solve_sums import SolveSums
from mlo.tensors import copies, have_same_values
from mlo.total_gradient import TotalGradient
from mlo.zero_terms import ZeroTerms, watched_problems

__all__ = ["History"]

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
        warned_of_no_steps: problems for which the warning about missing steps has been issued.
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
        self.warned_of_no_steps: set[str] = set()
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
        kept, now = self._ends[name][0], problem.parameters
        return not have_same_values([kept[key] for key in now], now.values())

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
            and have_same_values(
                [*parameters.values(), *state.values()],
                [recorded.evaluation.parameters[key] for key in parameters]
                + [begun[key] for key in state],
            )
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
        if name in self.warned_of_no_steps or engine is None:
            return
        self.warned_of_no_steps.add(name)
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
        """Whether the graph of a problem's update is kept; None: its first update will tell."""
        engine = self.engines[name]
        if name not in self.differentiated or not isinstance(engine, StepEngine):
            return False
        if engine.keeps_graph != "auto":
            return engine.keeps_graph
        parallel = losses[name].parallel
        return False if why_graph_cannot_be_kept(self.graph, self.engines, name, parallel) else None

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


def _copied_end(problem: Problem) -> End:
    """Copies of a problem's parameters and of its optimizers' state, as they are."""
    state = OptimizerStep.capture(problem).differentiable_state()
    return dict(zip(problem.parameters, copies(problem.parameters.values()), strict=True)), state


def _places_of(problem: Problem) -> tuple[tuple[int, int], ...]:
    """Memory and in-place version of every parameter."""
    return tuple([(p.data_ptr(), p._version) for p in problem.parameters.values()])
