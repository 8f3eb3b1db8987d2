"""`MultilevelOptimizer`: moves every problem of a dependency graph down its total gradient."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from html import escape
from typing import Any, get_args

import torch
from torch import Tensor
from torch.optim.lr_scheduler import ReduceLROnPlateau

from mlo.batches import BatchStream
from mlo.containers import tensors_of, versions_of
from mlo.distributed import DataParallel, data_parallel
from mlo.errors import (
    CheckpointError,
    GraphError,
    NonFiniteError,
    ProblemError,
    check_choice,
    nearest,
    warn_user,
)
from mlo.evaluation import LossModule
from mlo.graph import DependencyGraph, Order
from mlo.graph_picture import graph_svg
from mlo.hypergradient.base import Engine
from mlo.hypergradient.compatibility import (
    check_engines,
    check_kept_graphs,
    check_look_ahead,
    check_sharding,
)
from mlo.hypergradient.double_backward import check_checkpointing, check_double_backward
from mlo.hypergradient.optimizer_step import OptimizerStep
from mlo.hypergradient.registry import EngineChoice, engines_for
from mlo.nonfinite import (
    ROLLBACKS,
    SKIPS_IN_A_ROW,
    SNAPSHOT_EVERY,
    OnNonFinite,
    is_finite,
    nonfinite_error,
)
from mlo.problem import SINGLE_PLAYER, Problem, Tensors
from mlo.randomness import RandomState, preserved
from mlo.records import Record
from mlo.sharding import is_sharded, total_norm
from mlo.solutions import Solutions
from mlo.state import check_state, copied
from mlo.total_gradient import TotalGradient, total_gradient

__all__ = ["MultilevelOptimizer"]

STATE_VERSION = 1


class MultilevelOptimizer:
    """Optimizes problems that depend on each other's solutions.

    Args:
        problems: from the innermost to the outermost. A loss that reads a problem listed before its
            own is differentiated through that problem's solution; one that reads a later one takes
            its current value.
        hypergradient: how solutions are differentiated: an engine, a name
            (`mlo.available_engines()`), a mapping with a name and options, or a dict *lower
            problem* → one of these, with "default" for the others.
        on_nonfinite: what happens when a loss or gradient is not finite, which is noticed before
            the step is made: "stop" raises a `NonFiniteError`; "skip" leaves the problem as it was,
                for this update, and raises after ten in a row;
            "rollback" goes back to a state of at most a hundred rounds before, but not to its
            batches and noise (see `roll_back`), and raises after three times. None looks at
            nothing, which on a GPU saves a synchronisation an update.
        order: "lower_first": a round moves lower problems, then those that read their solutions.
            "outermost_first": the outermost problems (no one reads their solutions) begin it, as in
            DARTS's program. They look ahead at solutions: engines that differentiate a step make it
            on copies, with the batches that the lower problems draw next; these then make a step of
            their own from where they were, with the outermost problems' new values.
        distributed: how the processes of `torch.distributed` share the work: "exact", "final" or a
            `DataParallel`; None or "off": every process works by itself. In a single process it
            changes nothing.

    Attributes:
        around_update: problem name → a context manager in which each of its updates runs, for
            timing and profiling: `torch.profiler.record_function`, for example. It must not draw
                random numbers.

    Raises:
        ConfigurationError: if `on_nonfinite` or `order` is none of these.
        GraphError: if the problems do not form a valid graph.
        EngineError: if an engine is unknown or cannot serve this graph.
        ConfigurationError: if the processes do not fit together.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        hypergradient: EngineChoice | Mapping[str, EngineChoice] = "one_step",
        *,
        on_nonfinite: OnNonFinite | None = "stop",
        order: Order = "lower_first",
        distributed: DataParallel | str | None = None,
    ) -> None:
        check_choice("on_nonfinite", on_nonfinite, (*get_args(OnNonFinite), None))
        check_choice("order", order, get_args(Order))
        self.on_nonfinite = on_nonfinite
        self.order: Order = order
        self.graph = DependencyGraph(problems)
        self.engines: dict[str, Engine] = engines_for(self.graph.problems, hypergradient)
        self.round = 0
        self.around_update: Callable[[str], AbstractContextManager[Any]] = nullcontext
        self._schedule = self.graph.schedule(order)
        self._streams = {
            name: BatchStream(problem.data, name) for name, problem in self.problems.items()
        }
        self._modules = {
            name: LossModule(
                problem, {read: self.problems[read] for read in self.graph.reads[name]}
            )
            for name, problem in self.problems.items()
        }
        check_engines(self.graph, self.engines)
        self._looks_ahead = frozenset(self.graph.outermost if order == "outermost_first" else ())
        check_look_ahead(self.graph, self.engines, self._looks_ahead)
        self.parallel = data_parallel(distributed)
        check_kept_graphs(self.graph, self.engines, divided=self.parallel is not None)
        check_sharding(
            self.graph, self.engines, exact=self.parallel is not None and self.parallel.exact
        )
        if self.parallel is not None:
            described = [
                f"{name}: {problem!r}, {self.engines[name]}"
                for name, problem in self.problems.items()
            ]
            modules = {name: problem.module for name, problem in self.problems.items()}
            self.parallel.begin(
                modules, [f"sync={self.parallel.sync}, noise={self.parallel.noise}", *described]
            )
        for problem in self.problems.values():
            if problem.compile:
                problem.module.compile(
                    **(problem.compile if isinstance(problem.compile, Mapping) else {})
                )
        self._generators = [
            generator for problem in self.problems.values() for generator in problem.generators
        ]
        self._skips_in_a_row = dict.fromkeys(self.problems, 0)
        self._snapshot: dict[str, Any] | None = (
            None  # what "rollback" goes back to, and how often it did
        )
        self._rollbacks = 0
        self._warned: set[str] = set()
        self._examined: set[str] = set()
        this = weakref.proxy(
            self
        )  # so that an optimizer that is let go of is freed at once, with all that it holds
        self._solutions = Solutions(
            self.graph,
            self.engines,
            self._modules,
            self._streams,
            parallel=self.parallel,
            looks_ahead=self._looks_ahead,
            rests=lambda name: this._rests(name),
            total_gradient=lambda name, batches, ahead: this._total_gradient(
                name, batches, live=False, ahead=ahead, keep_graph=this.engines[name].keeps_graph
            ),
        )

    @property
    def problems(self) -> dict[str, Problem]:
        """Name → problem, from the innermost to the outermost."""
        return self.graph.problems

    def __repr__(self) -> str:
        engines = ", ".join(
            f"{name}: {self.engines[name].label}"
            for name in self.problems
            if name in self._solutions.differentiated
        )
        return (
            f"MultilevelOptimizer({' → '.join(self.problems)}; "
            f"{engines or 'no response is differentiated'})"
        )

    def _repr_html_(self) -> str:
        """The picture that a notebook shows: the graph, and which engine differentiates what."""
        return f"{graph_svg(self.graph)}<div><code>{escape(repr(self))}</code></div>"

    def run(self, steps: int) -> Iterator[Record]:
        """Runs `steps` rounds; yields the record of each, and of those that are run again after a
        rollback.
        """
        last = self.round + steps
        while self.round < last:
            yield self.step()

    def step(self) -> Record:
        """Runs one round: every problem is updated, in the order of `graph.schedule()`; returns its
        record.

        Raises:
            NonFiniteError: if a loss or gradient is not finite and `on_nonfinite` says, or comes
                to, stop.
        """
        if self.on_nonfinite != "rollback":
            return self._run_round()
        if self._snapshot is None or self.round >= self._snapshot["round"] + SNAPSHOT_EVERY:
            self._snapshot, self._rollbacks = self.state_dict(), 0
        cause: NonFiniteError | None = None
        while True:
            try:
                record = self._run_round()
            except NonFiniteError as error:
                if self._rollbacks == ROLLBACKS:
                    raise
                self._rollbacks += 1
                self.roll_back(self._snapshot)
                cause = error
            else:
                record.rolled_back = cause
                return record

    def _run_round(self) -> Record:
        if torch.is_inference_mode_enabled():
            raise ProblemError(
                "A round cannot run under torch.inference_mode(), where nothing has a gradient."
            )
        record = Record(round=self.round + 1)
        moving = [name for name in self._schedule if not self._rests(name)]
        if self._looks_ahead:
            self._solutions.forget_looks_ahead()
        for index, name in enumerate(moving):
            later: Sequence[str] = ()
            try:
                with self.around_update(name):
                    self._update(
                        name,
                        record,
                        keep_graph=self._solutions.keeps_graph(name, moving[index + 1 :]),
                    )
                later = moving[index + 1 :]
            except NonFiniteError:
                # The data of all problems stand at the end of this round, so that streams that go
                # together still do.
                for other in moving[index + 1 :]:
                    self._draw(other)
                raise
            finally:
                self._solutions.release_graphs(later)
        self.round += 1
        return record

    def gradient(self, name: str, *, fixed: Collection[str] = ()) -> Tensors:
        """Returns the total gradient of a problem's loss, and changes nothing.

        The gradient is taken at the current parameters and the problem's current batches: the ones
        of its last update, or, before the first, the ones that it will draw. Engines that
        differentiate the optimizer's step use the last step of each lower problem; for one that has
        not moved yet they look one step ahead of it.

        Args:
            name: the problem.
            fixed: problems whose solutions are taken for constants; what is missing then is what
                flows through them.

        Returns:
            parameter name → gradient, of the parameter's shape.

        Raises:
            GraphError: if there is no problem of that name.
        """
        held = frozenset((fixed,) if isinstance(fixed, str) else fixed)
        for other in (name, *held):
            if other not in self.problems:
                raise GraphError(f"There is no problem {other!r}. {nearest(other, self.problems)}")
        with self._unchanged():
            return self._total_gradient(
                name, self._solutions.batches(name), live=False, fixed=held
            ).gradient

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Runs the body and leaves solutions, engines' memory and random state as they were."""
        with self._solutions.preserved(), preserved(self._generators):
            yield

    def _rests(self, name: str) -> bool:
        return self.round < self.problems[name].warmup_steps

    def state_dict(self) -> dict[str, Any]:
        """Returns everything that a run needs to go on, as tensors and plain values (loadable with
        `weights_only=True`).

        Parameters, buffers, optimizers, schedulers, positions in the data, and the random state, as
        copies. Not the last
        steps themselves: until each problem has moved again, `gradient` looks ahead as it does
        before the first round.

        The same on all processes of a data-parallel run that were seeded alike (but for what
        `sync="final"` leaves in engines' memories): one process saves it, any number of them go on
        with it.

        Raises:
            CheckpointError: if parameters are sharded.
        """
        for name, problem in self.problems.items():
            if any(is_sharded(parameter) for parameter in problem.parameters.values()):
                raise CheckpointError(
                    f"Problem {name!r} has sharded parameters, of which no process has the whole. "
                    "Save its module and optimizer by torch.distributed.checkpoint."
                )
        return {
            "version": STATE_VERSION,
            "round": self.round,
            "random": RandomState.capture(self._generators).state_dict(),
            "problems": {
                name: {
                    "module": copied(dict(problem.module.state_dict())),
                    "optimizers": {
                        key: copied(o.state_dict()) for key, o in problem.optimizers.items()
                    },
                    "schedulers": {
                        key: copied(s.state_dict()) for key, s in problem.schedulers.items()
                    },
                    "data": self._streams[name].state_dict(),
                    "updates": self._solutions.updates[name],
                    "skips_in_a_row": self._skips_in_a_row[name],
                    "memory": {
                        key: tensor.clone() for key, tensor in self._solutions.memory[name].items()
                    },
                }
                for name, problem in self.problems.items()
            },
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes back to what `state_dict` returned.

        Raises:
            CheckpointError: if the state is of another graph, or of a version that this one cannot
                read.
        """
        self._load(state, position=True)
        self._snapshot, self._rollbacks = None, 0
        for name in self.problems:
            recorded, moves = self.engines[name].recorded_steps, self.problems[name].steps
            if name in self._solutions.differentiated and recorded > moves:
                warn_user(
                    f"The engine {self.engines[name].label!r} of problem {name!r} differentiates "
                    f"{recorded} steps, of which a state holds none and a round makes {moves}: "
                    "until there are as many, gradients are not those of a run that was not "
                    f"interrupted. With steps={recorded} of the problem they are."
                )

    def roll_back(self, state: Mapping[str, Any]) -> None:
        """Goes back to a state of `state_dict`, but not to its batches and noise, so that what
        failed is not repeated.

        Parameters, buffers, optimizers, schedulers and the round are those of the state; the data
        and the random state go on from where they are. (A round that ends in a `NonFiniteError` has
        taken the batches of all its updates.)

        Raises:
            CheckpointError: as `load_state_dict`.
        """
        self._load(state, position=False)

    def _load(self, state: Mapping[str, Any], *, position: bool) -> None:
        if state.get("version") != STATE_VERSION:
            raise CheckpointError(
                f"The state has version {state.get('version')!r}; this version of mlo reads "
                f"{STATE_VERSION}."
            )
        if set(state["problems"]) != set(self.problems):
            raise CheckpointError(
                f"The state is of the problems {sorted(state['problems'])}, this optimizer has "
                f"{sorted(self.problems)}."
            )
        random_state = RandomState.from_state_dict(state["random"])
        if len(random_state.generators) != len(self._generators):
            raise CheckpointError(
                f"The state has {len(random_state.generators)} generators, the problems name "
                f"{len(self._generators)}."
            )
        for name, problem in self.problems.items():  # all of it, before anything is changed
            check_state(problem, state["problems"][name])
        for name, problem in self.problems.items():
            saved = state["problems"][name]
            try:
                problem.module.load_state_dict(saved["module"])
                for key, optimizer in problem.optimizers.items():
                    optimizer.load_state_dict(saved["optimizers"][key])
                for key, scheduler in problem.schedulers.items():
                    scheduler.load_state_dict(saved["schedulers"][key])
            except (RuntimeError, KeyError, ValueError) as error:
                raise CheckpointError(
                    f"The state of problem {name!r} does not fit its module, optimizer or "
                    f"scheduler: {error}"
                ) from error
            if position:
                self._streams[name].load_state_dict(saved["data"])
            self._solutions.updates[name] = saved["updates"]
            self._skips_in_a_row[name] = saved.get("skips_in_a_row", 0)
            self._solutions.memory[name].clear()
            self._solutions.memory[name].update(
                {
                    key: tensor.to(problem.device, copy=True)
                    for key, tensor in saved["memory"].items()
                }
            )
        self.round = state["round"]
        self._solutions.forget()
        if position:
            random_state.restore(self._generators)
        if self.parallel is not None:
            for name, problem in self.problems.items():
                self.parallel.check_equal(
                    {f"{name}.{key}": tensor for key, tensor in problem.parameters.items()}
                )

    # ------------------------------ one update

    def _update(self, name: str, record: Record, *, keep_graph: bool) -> None:
        moves = self.problems[name].moves
        for index, players in enumerate(moves):
            try:
                last = index + 1 == len(moves)
                self._move(name, players, record, last=last, keep_graph=keep_graph and last)
            except NonFiniteError:
                for _ in moves[index + 1 :]:
                    self._draw(name)
                raise

    def _move(
        self, name: str, players: Collection[str], record: Record, *, last: bool, keep_graph: bool
    ) -> None:
        """Moves players of a problem; the last move of an update, of all players, is the one that
        is differentiated.
        """
        problem = self.problems[name]
        batches = self._draw(name)
        if self.parallel is not None and self._solutions.updates[name] == 0:
            self.parallel.warn_of_equal_batches(name, tensors_of(batches))
        memory = self._solutions.copied_memory()
        found = self._total_gradient(
            name, batches, live=True, moving=players, keep_graph=keep_graph
        )
        norm = total_norm(found.gradient.values())
        if self.on_nonfinite is not None and not is_finite(norm, found.losses.values()):
            self._solutions.recall(memory)
            self._refuse(name, found, record)
            return
        self._skips_in_a_row[name] = 0
        keeps_step = last and self._solutions.keeps_step(name)
        step = None
        if keeps_step:
            step = OptimizerStep.capture(
                problem, linear_state=self.engines[name].applies_linear_steps
            )
        for key, parameter in problem.parameters.items():
            # Clipping and some optimizers change a gradient in place, but the recorded step starts
            # from the bare one, a kept graph may need it, and autograd gives one tensor to several
            # parameters (a + b), or an expanded one (a.sum()).
            gradient = found.gradient[key]
            if problem.grad_clip is not None or found.graph is not None:
                gradient = gradient.clone()
            parameter.grad = None if key in found.unused else gradient
        if problem.grad_clip is not None:
            torch.nn.utils.clip_grads_with_norm_(
                problem.parameters.values(), problem.grad_clip, norm
            )
        for optimizer in problem.optimizers.values():
            optimizer.step()
        for parameter in problem.parameters.values():
            parameter.grad = None
        for player, scheduler in problem.schedulers.items():
            if player in problem.players and player not in players:
                continue
            if isinstance(scheduler, ReduceLROnPlateau):
                scheduler.step(float(found.losses.get(player, sum(found.losses.values()))))
            else:
                scheduler.step()
        self._solutions.updates[name] += 1
        if not last:
            return
        self._solutions.record(name, found, step)
        self._note(name, found, norm, record)

    @torch.no_grad()
    def _refuse(self, name: str, found: TotalGradient, record: Record) -> None:
        """Leaves an update out whose gradient is not finite.

        Raises:
            NonFiniteError: unless it is to be skipped, and not too many in a row are.
        """
        problem = self.problems[name]
        if found.graph is not None:
            found.graph.release()
        for key, buffer in problem.module.named_buffers():
            buffer.copy_(found.evaluation.buffers[name][key])

        def again(fixed: frozenset[str]) -> Tensors:
            with self._unchanged():
                found.evaluation.random_states[0].restore(problem.generators)
                return self._total_gradient(
                    name, found.evaluation.batches, live=False, fixed=fixed
                ).gradient

        error = nonfinite_error(
            problem,
            found,
            self.round + 1,
            self._solutions.updates[name] + 1,
            [
                other
                for other in self.problems
                if other in self.graph.responses(name) and other in self._solutions.differentiated
            ],
            {other: self.problems[other] for other in self.graph.reads[name]},
            again,
        )
        self._skips_in_a_row[name] += 1
        if self.on_nonfinite != "skip" or self._skips_in_a_row[name] > SKIPS_IN_A_ROW:
            raise error
        record.skipped[name] = error

    def _draw(self, name: str) -> tuple[Any, ...]:
        """Takes the batches of one update.

        Raises:
            ProblemError: if drawing a batch changed an earlier one.
        """
        batches: list[Any] = []
        versions: list[tuple[int, ...]] = []
        for _ in range(self.problems[name].accumulate):
            batches.append(self._streams[name].next())
            versions.append(versions_of(batches[-1]))
        if list(map(versions_of, batches)) != versions:
            raise ProblemError(
                f"Problem {name!r}: a batch was changed in place after it was drawn; perhaps its "
                "data fill one buffer again and again. Yield new tensors (batch.clone())."
            )
        return tuple(batches)

    def _total_gradient(
        self,
        name: str,
        batches: tuple[Any, ...],
        *,
        live: bool,
        fixed: frozenset[str] = frozenset(),
        moving: Collection[str] | None = None,
        ahead: bool = False,
        keep_graph: bool = False,
    ) -> TotalGradient:
        """Computes the total gradient of a problem's loss at its current parameters (see
        `total_gradient`).

        Args:
            name: the problem.
            batches: its batches.
            live: whether it is the problem's own update.
            fixed: problems whose solutions are taken for constants.
            moving: the players that move; None: all.
            ahead: whether it is taken for a problem that looks ahead at this one's solution.
            keep_graph: whether the gradient's graph is kept.
        """
        ahead = ahead or name in self._looks_ahead
        found = total_gradient(
            self._solutions.evaluation(
                name,
                batches,
                states=(),
                copy=live and self._solutions.keeps_step(name),
                ahead=ahead,
            ),
            live=live,
            examine=None if name in self._examined else partial(self._examine, name),
            fixed=fixed,
            moving=moving,
            keep_graph=keep_graph,
        )
        if moving is None or len(moving) == len(self.problems[name].player_parameters):
            self._examined.add(name)
        if not found.has_derivative and not fixed:
            self._explain_zero(name)
        return found

    def _examine(self, name: str, loss: Tensor, parameters: Sequence[Tensor]) -> None:
        """Refuses a loss, on its first batch, whose graph cannot give what is needed of it."""
        check_checkpointing(name, loss)
        if name in self._solutions.differentiated and self.engines[name].products.differentiable:
            check_double_backward(name, loss, parameters)

    def _explain_zero(self, name: str) -> None:
        """Says why a loss has no derivative in any parameter.

        Raises:
            ProblemError: if the loss is cut off from all parameters.
        """
        earlier = list(self.problems)[: self.graph.position[name]]
        dropped = [other for other in earlier if self.engines[other].drops_implicit_term]
        resting = [other for other in earlier if self._rests(other)]
        if not dropped and not resting:
            raise ProblemError(
                f"The loss of problem {name!r} does not depend on any parameter: it was detached, "
                "computed under torch.no_grad(), or reads none."
            )
        if name not in self._warned:
            self._warned.add(name)
            cause = (
                f"'first_order' of {', '.join(dropped)}"
                if dropped
                else f"warm-up of {', '.join(resting)}"
            )
            warn_user(
                f"The gradient of problem {name!r} is zero: its loss depends only on the solutions "
                f"of other problems, and the {cause} drops their derivative. Choose an engine that "
                "keeps it, such as 'one_step'."
            )

    def _note(self, name: str, found: TotalGradient, norm: Tensor, record: Record) -> None:
        """Writes an update into the record, and warns once per problem of a solve that did not
        converge.
        """
        problem = self.problems[name]
        players = {
            player: total_norm(found.gradient[key] for key in keys)
            for player, keys in problem.player_parameters.items()
            if problem.is_game
        }
        record.add(
            name,
            loss=found.losses if problem.is_game else found.losses[SINGLE_PLAYER],
            metrics=found.metrics,
            gradient_norm=norm,
            player_norms=players or None,
        )
        for report in found.reports:
            record.solves[report.problem] = report
            if not report.converged and report.problem not in self._warned:
                self._warned.add(report.problem)
                residual = (
                    "" if report.residual is None else f" (relative residual {report.residual:.2g})"
                )
                warn_user(
                    f"Engine {report.engine!r} did not converge on problem "
                    f"{report.problem!r}{residual}. {report.advice} Later failures on this problem "
                    "are only in the records."
                )
