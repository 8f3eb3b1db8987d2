"""`MultilevelOptimizer`: moves every problem of a dependency graph down its total gradient."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from time import perf_counter
from typing import Any, Literal, NoReturn, get_args, overload

import torch

from mlo.batches import BatchStream
from mlo.distributed import DataParallel, data_parallel
from mlo.engine_checks import check_engines, check_restarts
from mlo.errors import (
    CheckpointError,
    CheckpointWarning,
    GraphError,
    NonFiniteError,
    ProblemError,
    check_choice,
    nearest,
    warn_user,
)
from mlo.graph import DependencyGraph, Order
from mlo.history import History
from mlo.hypergradient.registry import EngineChoice, engines_for
from mlo.lazy_rounds import LazyRounds, check_count
from mlo.levels import Levels
from mlo.loss import LossFunction
from mlo.nonfinite import ROLLBACKS, SNAPSHOT_EVERY, OnNonFinite
from mlo.notebook_table import table_html
from mlo.problem import Problem, Tensors
from mlo.records import GradientReport, Record
from mlo.restart import restarts_in, starts_of
from mlo.solution import AbstractEngine, StepEngine
from mlo.state import load_state, state_of
from mlo.stationarity import stationarities
from mlo.update import Update, Updater

__all__ = ["MultilevelOptimizer"]

ONE_AT_A_TIME = threading.RLock()
"""Held during an update or a question, because random states belong to the whole process.

A loss is evaluated again with the noise that it had. Optimizers in other threads wait meanwhile, so
that they do not draw the same numbers.
"""


class MultilevelOptimizer:
    """Optimizes problems that depend on each other's solutions.

    Args:
        problems: from the innermost to the outermost; also a dict of them by name, such as
            another optimizer's `problems`. A loss that reads a problem listed before its
            own is differentiated through that problem's solution; one that reads a later one takes
            its current value.
        hypergradient: how solutions are differentiated: an engine, a name
            (`mlo.available_engines()`), a mapping with a name and options, or a dict *lower
            problem* → one of these, with "default" for the others.
        on_nonfinite: what happens before a step if its loss or gradient is not finite. "stop"
            raises a `NonFiniteError`. "skip" leaves out the update, and raises after ten in a row.
            "rollback" returns to a state at most a hundred rounds old, but not to its batches and
            noise (see `roll_back`). It raises after three returns to one state, and in a round that
            had begun when a state was loaded or the policy was set. None checks nothing, which on a
            GPU saves a synchronisation per update.
        order: "lower_first": a round moves lower problems, then those that read their solutions.
            "outermost_first": the outermost problems, whose solutions nothing reads, move first, as
            in DARTS's program. They see lower solutions one step ahead. Engines that differentiate
            a step make it on copies, with the batches that the lower problems draw next. The lower
            problems then step from their own points, with the outermost problems' new values.
            "simultaneous": all gradients of a round are taken at its starting point, then all
            problems move, as in SOBA's Algorithm 1. Implicit engines take their products through
            the graph of the lower problem's own gradient.
        distributed: how the processes of `torch.distributed` share the work: "exact", "final" or a
            `DataParallel`. None or "off": every process works alone. In a single process it changes
            nothing.

    Attributes:
        graph: the `DependencyGraph` of the problems, which prints and draws itself.
        engines: lower problem → the engine that differentiates its solution.
        around_update: problem name → a context manager in which each of its updates runs, for
            timing and profiling: `torch.profiler.record_function`, for example. It must not draw
            random numbers.

    Raises:
        ConfigurationError: if `on_nonfinite` or `order` is none of these, or if the processes do
            not fit together.
        GraphError: if the problems do not form a valid graph.
        EngineError: if an engine is unknown or does not support this graph.
    """

    def __init__(
        self,
        problems: Sequence[Problem] | Mapping[str, Problem],
        hypergradient: EngineChoice | Mapping[str, EngineChoice] = "one_step",
        *,
        on_nonfinite: OnNonFinite | None = "stop",
        order: Order = "lower_first",
        distributed: DataParallel | str | None = None,
    ) -> None:
        check_choice("on_nonfinite", on_nonfinite, (*get_args(OnNonFinite), None))
        check_choice("order", order, get_args(Order))
        self.order: Order = order
        self.graph = DependencyGraph(problems)
        self.engines: dict[str, AbstractEngine] = engines_for(self.graph.problems, hypergradient)
        self.around_update: Callable[[str], AbstractContextManager[Any]] = nullcontext
        looks_ahead = frozenset(self.graph.outermost if order == "outermost_first" else ())
        self.parallel = data_parallel(distributed)
        starts = starts_of(self.graph.problems)
        check_engines(
            self.graph,
            self.engines,
            looks_ahead=looks_ahead,
            parallel=self.parallel,
            simultaneous=order == "simultaneous",
        )
        check_restarts(self.graph, self.engines, starts, looks_ahead=looks_ahead)
        self._start_processes()
        for problem in self.problems.values():
            if problem.compile:
                options = problem.compile if isinstance(problem.compile, Mapping) else {}
                problem.module.compile(**options)

        losses: dict[str, LossFunction] = {}
        for name, problem in self.problems.items():
            reads = {read: self.problems[read] for read in self.graph.reads[name]}
            losses[name] = LossFunction(problem, reads, self.parallel)
        streams = {name: BatchStream(p.data, name) for name, p in self.problems.items()}
        self._history = History(
            self.graph,
            self.engines,
            losses,
            streams,
            starts=starts,
            looks_ahead=looks_ahead,
            simultaneous=order == "simultaneous",
        )

        # Each problem sees the solutions below it through one of two views.
        self._now, self._ahead = Levels(self._history), Levels(self._history, ahead=True)
        self._levels = {
            name: self._ahead if name in looks_ahead else self._now for name in self.problems
        }
        self._updater = Updater(
            self._history, self._levels, on_nonfinite=on_nonfinite, parallel=self.parallel
        )

        for problem in self.problems.values():
            problem.seal()
        # The round that is being made: its record, and the updates that it still has to make.
        self._schedule = self.graph.schedule(order)
        self._record = Record(round=0)
        self._waiting: tuple[str, ...] = ()
        self._turns: tuple[int, ...] = ()  # of its updates, which turn of its problem each one is
        self._restarts: list[list[str]] = []  # the problems that restart before each of them
        self._counted: tuple[str, ...] = ()  # the updates whose turns these are
        self._warm_from = max(problem.warmup_steps for problem in self.problems.values())
        # What "rollback" returns to, how often it has done so, and why it last did.
        self._snapshot: dict[str, Any] | None = None
        self._rollbacks = 0
        self._cause: NonFiniteError | None = None

    def _start_processes(self) -> None:
        """Checks that all processes declare the same, and gives them process 0's parameters."""
        if self.parallel is None:
            return
        # What all processes must have declared alike.
        lines = [f"sync={self.parallel.sync}, noise={self.parallel.noise}"]
        for name, problem in self.problems.items():
            lines.append(f"{name}: {problem!r}, {self.engines[name]}")
        self.parallel.begin({name: p.module for name, p in self.problems.items()}, lines)

    @property
    def problems(self) -> dict[str, Problem]:
        """Name → problem, from the innermost to the outermost."""
        return self.graph.problems

    @property
    def on_nonfinite(self) -> OnNonFinite | None:
        """What happens when a loss or gradient is not finite."""
        return self._updater.on_nonfinite

    @on_nonfinite.setter
    def on_nonfinite(self, value: OnNonFinite | None) -> None:
        check_choice("on_nonfinite", value, (*get_args(OnNonFinite), None))
        if value != self._updater.on_nonfinite:
            self._snapshot, self._rollbacks = None, 0  # a state of before may be too old
        self._updater.on_nonfinite = value

    @property
    def round(self) -> int:
        """The number of rounds that were made."""
        return self._history.round

    @round.setter
    def round(self, value: int) -> None:
        self._history.round = value

    def __repr__(self) -> str:
        labels = [
            f"{name}: {self.engines[name].label}"
            for name in self.problems
            if name in self._history.differentiated
        ]
        engines = ", ".join(labels) or "no response is differentiated"
        return f"MultilevelOptimizer({' → '.join(self.problems)}; {engines})"

    def _repr_html_(self) -> str:
        """The notebook's view: the graph, and which engine differentiates what."""
        rows = []
        for name, problem in self.problems.items():
            engine = self.engines[name].label if name in self._history.differentiated else "-"
            rows.append((name, f"{problem.size:,}", problem.optimizer_names, problem.steps, engine))
        headings = ("problem", "parameters", "optimizer", "steps", "differentiated by")
        title = f"A round: {self.graph.round_text(self.order)}. Rounds made: {self.round:,}"
        return f"<div>{self.graph.to_svg()}{table_html(title, headings, rows)}</div>"

    # ------------------------------ rounds

    def run(self, steps: int) -> Iterator[Record]:
        """Makes `steps` rounds, each when its record is requested.

        Use it in a loop: `for record in optimizer.run(100): ...`, or `list(optimizer.run(100))`. A
        call whose records are never requested makes nothing, and warns.

        Returns:
            An iterator over the record of each round, and of those that are made again after a
            rollback.

        Raises:
            ConfigurationError: if `steps` is not a number of rounds.
        """
        check_count("run", "steps", steps)

        def rounds() -> Iterator[Record]:
            last = self.round + steps
            while self.round < last:
                yield self.step()

        return LazyRounds(rounds(), f"run(steps={steps})")

    def step(self) -> Record:
        """Makes one round, or the rest of an interrupted one: every problem is updated.

        The order is that of `graph.schedule()`.

        Raises:
            NonFiniteError: if a loss or gradient is not finite, and `on_nonfinite` is "stop" or its
                limit is reached.
        """
        self._advance(wants_update=False)
        while self._waiting:
            self._advance(wants_update=False)
        return self._record

    def updates(self, rounds: int) -> Iterator[Update]:
        """Makes `rounds` rounds update by update, so that a caller can act inside a round.

        Between two updates the caller may log, validate, save, average weights elsewhere, or leave
        the loop. An interrupted round stays as it is. The next `updates`, `step` or `run` first
        makes the rest of it, which counts as one of `rounds`. A state saved there resumes there,
        though not with the same numbers (see `state_dict`).

        Args:
            rounds: number of rounds, after which the iterator ends.

        Returns:
            An iterator over every update of every problem, after it was made; also the ones that
            are made again after a rollback. An update is made when it is requested, as in `run`.

        Raises:
            NonFiniteError: as `step`.
        """
        check_count("updates", "rounds", rounds)

        def updates() -> Iterator[Update]:
            last = self.round + rounds
            while self.round < last:
                update = self._advance()
                if update is not None:
                    yield update

        return LazyRounds(updates(), f"updates(rounds={rounds})")

    def _advance(self, *, wants_update: bool = True) -> Update | None:
        """Makes the next update, in this round or a new one; None: no problem has moved in it.

        Args:
            wants_update: whether the caller needs the update; otherwise the result is None.
        """
        if torch.is_inference_mode_enabled():
            raise ProblemError(
                f"A round of {', '.join(self.problems)} cannot run under torch.inference_mode(), "
                "because nothing has a gradient there. Leave that mode for this call."
            )
        # Runs once, except after a rollback, which starts an earlier round again.
        while True:
            if not self._waiting:
                self._begin_round()
            if not self._waiting:  # all problems are warming up
                self.round += 1
                return None
            name, later = self._waiting[0], self._waiting[1:]
            record = self._record
            moves = self._moves(name, later)
            before = self._history.updates[name]
            try:
                with ONE_AT_A_TIME:
                    self._update(name, later, moves=moves)
            except NonFiniteError as error:
                # The round is over for all problems, whether the run stops or rolls back.
                self._waiting = ()
                if self.on_nonfinite != "rollback" or self._rollbacks == ROLLBACKS:
                    raise
                if self._snapshot is None:
                    error.add_note(
                        "on_nonfinite='rollback' has no state to return to: states are taken when "
                        "a round begins, and this round had begun when the policy was set or a "
                        "state was loaded. Load an earlier state, or one saved between rounds."
                    )
                    raise
                self._rollbacks += 1
                self._load(self._snapshot, position=False)
                self._cause = error
                continue
            except BaseException:
                # An exception of `after_update` (Ctrl-C in a validation) comes after the update.
                made = self._history.updates[name] - before
                if made == len(self.problems[name].player_moves):
                    self._pass(later)
                raise

            # The round is advanced before the caller sees the update, which may save a state.
            number = self._history.round + 1
            self._pass(later)
            if not moves or not wants_update:
                return None
            return Update(problem=name, round=number, record=record, ends_round=not later)

    def _begin_round(self) -> None:
        if self._updater.on_nonfinite == "rollback":
            due = self._snapshot is None or self.round >= self._snapshot["round"] + SNAPSHOT_EVERY
            if due:
                self._snapshot, self._rollbacks = self.state_dict(), 0
        if self._history.looks_ahead:
            # Solutions ahead were made with the batches that came next, which are drawn by now.
            self._forget_solutions()
        for loss in self._history.losses.values():
            loss.check_unedited()
        self._history.sums.clear()  # of a round that a failure has ended
        self._record = Record(round=self._history.round + 1)
        self._waiting = self._planned()

    def _moving(self) -> tuple[str, ...]:
        """The updates of the current round, in order."""
        if self._history.round >= self._warm_from:
            return self._schedule
        return tuple(name for name in self._schedule if not self._history.rests(name))

    def _planned(self) -> tuple[str, ...]:
        """The updates of the current round whose turns are counted."""
        moving = self._moving()
        if moving is not self._counted:  # the schedule, in all rounds but those of warming up
            seen = dict.fromkeys(self.problems, 0)
            turns: list[int] = []
            for name in moving:
                turns.append(seen[name])
                seen[name] += 1
            self._turns, self._counted = tuple(turns), moving
            self._restarts = restarts_in(
                self.problems,
                self.graph.solutions_in,
                self._history.starts,
                moving,
                turns,
                looks_ahead=self._history.looks_ahead,
            )
        return moving

    def _pass(self, later: tuple[str, ...]) -> None:
        """Goes on behind an update that was made; the `later` ones are still to come."""
        self._waiting = later
        if not later:
            self._record.rolled_back, self._cause = self._cause, None
            self._history.round += 1

    def _update(self, name: str, later: tuple[str, ...], *, moves: bool) -> None:
        """Makes one update, and releases the graphs that those `later` in the round do not need."""
        history = self._history
        needed: tuple[str, ...] = ()
        try:
            if self.around_update is nullcontext:
                self._timed_update(name, later, moves=moves)
            else:
                with self.around_update(name):
                    self._timed_update(name, later, moves=moves)
            needed = later
        except NonFiniteError:
            # The data of all problems advance to the end of this round, so that streams that go
            # together still do.
            for other in later:
                self._updater.draw(other)
            raise
        finally:
            if history.graphs:
                history.release_graphs(needed)

    def _timed_update(self, name: str, later: tuple[str, ...], *, moves: bool) -> None:
        """Makes one update, and records how long it took."""
        history, seconds = self._history, self._record.seconds
        began = perf_counter()
        for beginning in self._restarts[self._place(later)]:
            history.restart(beginning)
            if beginning != name:
                self._now.forget()  # solutions that were made where it stood
        keep_graph = history.graph_needed_later(name, later)
        self._updater.update(name, self._record, keep_graph=keep_graph, moves=moves)
        seconds[name] = seconds.get(name, 0.0) + perf_counter() - began

    def _place(self, later: tuple[str, ...]) -> int:
        """An update's place in the round, from 0; those `later` are still to come."""
        # A saved state holds it, and a skipped update does not move it.
        return len(self._turns) - len(later) - 1

    def _moves(self, name: str, later: tuple[str, ...]) -> bool:
        """Whether the problem moves in this turn, or only adds to the gradient of a later one."""
        solves = self.graph.problems[name].accumulate_solves
        return solves == 1 or (self._turns[self._place(later)] + 1) % solves == 0

    def _forget_solutions(self) -> None:
        self._now.forget()
        self._ahead.forget()

    # ------------------------------ a question

    @overload
    def gradient(
        self, name: str, *, held_constant: Collection[str] = (), report: Literal[False] = False
    ) -> Tensors: ...

    @overload
    def gradient(
        self, name: str, *, held_constant: Collection[str] = (), report: Literal[True]
    ) -> GradientReport: ...

    def gradient(
        self, name: str, *, held_constant: Collection[str] = (), report: bool = False
    ) -> Tensors | GradientReport:
        """Returns the total gradient of a problem's loss, and changes nothing.

        The gradient is taken at the current parameters and the problem's current batches: those of
        its last update or, before the first, those that it will draw. Engines that differentiate
        the optimizer's step use the last step of each lower problem. If a problem has not moved
        yet, or its parameters were set from outside since, they look one step ahead. (Engines of
        one step do not notice a change through `.data` or numpy. Make it under `torch.no_grad()`.)

        Args:
            name: the problem.
            held_constant: problems whose solutions are treated as constants. The difference from
                the full gradient is the part that flows through them.
            report: whether to return the reports of the solves as well.

        Returns:
            parameter name → gradient, of the parameter's shape; with `report` a `GradientReport`
            of this gradient and of how its solves went.

        Raises:
            GraphError: if there is no problem of that name.
        """
        held = frozenset((held_constant,) if isinstance(held_constant, str) else held_constant)
        for other in (name, *held):
            if other not in self.graph.problems:
                raise GraphError(
                    f"There is no problem {other!r}. {nearest(other, self.graph.problems)}"
                )
        for loss in self._history.losses.values():
            loss.check_unedited()
        levels = self._levels[name]
        with ONE_AT_A_TIME, levels.unchanged():
            batches = levels.batches(name)
            found = levels.differentiate(name, batches, held_constant=held)
            if self._history.loaded:
                self._history.warn_of_other_batches(name, found.evaluation)
            if not report:
                return found.gradient
            solved = stationarities(found.evaluation, held)
        return GradientReport(
            gradient=found.gradient, reports=tuple(found.reports), stationarity=solved
        )

    # ------------------------------ averages

    @property
    def averages(self) -> dict[str, Tensors]:
        """Problem with `average=` → parameter → the average of its iterates, as copies."""
        history = self._history
        return {
            name: averages.values(self.problems[name].parameters)
            for name, averages in history.averages.items()
        }

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Puts the averages into their problems' modules while the body runs, for evaluation.

        Buffers, such as BatchNorm's running statistics, are those of the run.
        """
        with ExitStack() as stack:
            for name, tensors in self.averages.items():
                stack.enter_context(self._history.losses[name].placed({name: tensors}))
            yield

    # ------------------------------ state

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Refuses to be copied or pickled: steps, functions and open data are no plain values.

        Raises:
            ProblemError: in any case.
        """
        raise ProblemError(
            "A MultilevelOptimizer cannot be copied or pickled, because it holds functions, graphs "
            "and data that are being read. Make another one as this one was made, and give it "
            "this one's state: other.load_state_dict(optimizer.state_dict())."
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that a run needs to resume, as tensors and plain values.

        It holds copies of parameters, buffers, optimizers, schedulers, positions in the data and in
        the round, and the random state. It can be loaded with `weights_only=True`. It does not hold
        the last steps: until each problem has moved again, `gradient` looks ahead as it does before
        the first round. A `CheckpointWarning` says so. The rest of a round inside which the state
        was saved looks ahead too, where it needs a step that was made. A `CheckpointWarning` tells
        of it when the state is saved: the numbers are then not those of an uninterrupted run.
        Between rounds they are.

        All processes of a data-parallel run that were seeded alike have the same state (except for
        what `sync="final"` leaves in engines' memories). So one process saves it, and any number of
        them resume from it.

        Raises:
            CheckpointError: if parameters are sharded, or a simultaneous round is half made.
        """
        if self._waiting and self.order == "simultaneous":
            raise CheckpointError(
                "A simultaneous round cannot be saved halfway, because the remaining problems "
                "must see the others as they were when it began. Save between rounds."
            )
        # If nothing is waiting, the round is complete, and the next one has not begun.
        made = len(self._moving()) - len(self._waiting) if self._waiting else 0
        history = self._history
        steps = {name for name in self._moving()[:made] if history.step_needed(name, self._waiting)}
        if steps:
            warnings.warn(
                f"This state is saved inside round {self.round + 1}, and it does not hold the "
                f"steps that {', '.join(sorted(steps))} made in it. If it is loaded, the rest of "
                "the round looks one step ahead instead, and its numbers may differ. Save "
                "between rounds: at an update with `ends_round`, or after step().",
                CheckpointWarning,
                stacklevel=2,
            )
        return state_of(
            self._history, skips_in_a_row=self._updater.skips_in_a_row, within_round=made
        )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Returns to what `state_dict` returned.

        Optimizers' settings, such as learning rates, become those of the state. All else is as
        declared here: engines, `steps` and the like. A `CheckpointWarning` names what differs from
        the declaration that the state was saved of.

        Raises:
            CheckpointError: if the state is of another graph, or of a version that this one cannot
                read.
        """
        self._load(state, position=True)
        self._snapshot, self._rollbacks = None, 0
        for name, problem in self.problems.items():
            engine = self._history.step_engines[name]
            begins_anew = name in self._history.starts
            if engine is not None and engine.recorded_steps > problem.steps and not begins_anew:
                _warn_of_few_steps(problem, engine)

    def roll_back(self, state: Mapping[str, Any]) -> None:
        """Returns to a state, but not to its batches and noise, so that no failure is repeated.

        Parameters, buffers, optimizers, schedulers and the round become those of the state. The
        data and the random state stay where they are. (A round that ends in a `NonFiniteError` has
        taken the batches of all its updates.)

        Raises:
            CheckpointError: as `load_state_dict`.
        """
        self._load(state, position=False)
        self._snapshot, self._rollbacks = None, 0

    def _load(self, state: Mapping[str, Any], *, position: bool) -> None:
        made = load_state(
            state,
            self._history,
            skips_in_a_row=self._updater.skips_in_a_row,
            position=position,
        )
        self._forget_solutions()
        self._record = Record(round=self.round + 1)
        self._waiting = self._planned()[made:] if made else ()
        for names in self._restarts[:made]:
            for name in names:
                self._history.note_begun(name)
        if self.parallel is not None:
            for name, problem in self.problems.items():
                own = {f"{name}.{key}": tensor for key, tensor in problem.parameters.items()}
                self.parallel.check_equal(own)


def _warn_of_few_steps(problem: Problem, engine: StepEngine) -> None:
    recorded = engine.recorded_steps
    warn_user(
        f"The engine {engine.label!r} of problem {problem.name!r} differentiates {recorded} "
        f"steps. A state holds none of them, and a round makes {problem.steps}. Until there are "
        "enough, gradients differ from those of an uninterrupted run. Give the problem "
        f"steps={recorded} to avoid this."
    )
