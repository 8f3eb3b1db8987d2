"""One update of a problem: draw batches, differentiate, check the numbers, clip, step, record."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from mlo.advice import WITHOUT_STEPS
from mlo.bare_step import leaves_gradients, make_step
from mlo.batches import Taken
from mlo.distributed import DataParallel
from mlo.errors import NonFiniteError, ProblemError, warn_user
from mlo.gradient_norm import GradientNorm, total_norm
from mlo.graph_memory import NotCountable
from mlo.history import History
from mlo.inner_optimizer import innermost, is_foreign
from mlo.levels import Levels
from mlo.nonfinite import SKIPS_IN_A_ROW, OnNonFinite, nonfinite_error
from mlo.optimizer_step import (
    OptimizerStep,
    clip_by_norm,
    is_fused,
    plain_steps,
)
from mlo.problem import Problem, Tensors
from mlo.randomness import RandomState
from mlo.records import Record
from mlo.response import Evaluation, StepEngine, restore_buffers
from mlo.solve_sums import SolveSums
from mlo.step_checks import StepChecks, check_schedulers
from mlo.step_formulas import check_values, common_numbers
from mlo.tensors import copied_options, copies, laid_out, tensors_of
from mlo.total_gradient import TotalGradient

__all__ = ["Update", "Updater"]


@dataclass(frozen=True, kw_only=True)
class Update:
    """An update that was made, as `MultilevelOptimizer.updates` yields it.

    Attributes:
        problem: name of the problem that moved.
        round: number of the round, counted from 1.
        record: of the round so far.
        ends_round: whether it was the last update of the round.
    """

    problem: str
    round: int
    record: Record
    ends_round: bool


class _Watched(NamedTuple):
    """A problem's parameters before its loss was evaluated."""

    versions: list[int]
    values: Sequence[Tensor] | None


class Updater:
    """Makes updates.

    Args:
        history: what has happened; every update is recorded there.
        levels: problem → the solutions as its loss sees them: now, or one step ahead.
        on_nonfinite: what happens when a loss or gradient is not finite; None: nothing is checked.
        parallel: the processes that share batches.

    Attributes:
        on_nonfinite: the same.
        skips_in_a_row: problem → updates that were left out since its last one.
    """

    def __init__(
        self,
        history: History,
        levels: Mapping[str, Levels],
        *,
        on_nonfinite: OnNonFinite | None,
        parallel: DataParallel | None,
    ) -> None:
        self._history, self._levels = history, levels
        self.on_nonfinite, self._parallel = on_nonfinite, parallel
        self.skips_in_a_row = dict.fromkeys(history.graph.problems, 0)
        self._step_checks = StepChecks()
        self._warned: set[str] = set()
        self._written: set[str] = set()  # problems whose losses write to their parameters

    def update(self, name: str, record: Record, *, keep_graph: bool, moves: bool = True) -> None:
        """Makes an update of a problem: one move or, with `player_steps`, several.

        Args:
            name: the problem.
            record: of the round.
            keep_graph: whether the gradient of the last move is kept with its graph.
            moves: whether the problem moves, or only adds to the gradient of a later turn
                (`accumulate_solves`).

        Raises:
            NonFiniteError: if a loss or gradient is not finite, and the update is not skipped. The
                batches of all its moves have been taken then.
        """
        player_moves = self._history.graph.problems[name].player_moves
        for index, players in enumerate(player_moves):
            last = index + 1 == len(player_moves)
            try:
                self._update_once(
                    name, players, record, last=last, keep_graph=keep_graph and last, moves=moves
                )
            except NonFiniteError:
                # Streams that belong together stay together, whichever move has failed.
                for _ in player_moves[index + 1 :]:
                    self.draw(name)
                raise

    def _update_once(
        self,
        name: str,
        players: tuple[str, ...],
        record: Record,
        *,
        last: bool,
        keep_graph: bool,
        moves: bool,
    ) -> None:
        """Moves players once; only the last move of an update is differentiated later."""
        history, problem = self._history, self._history.graph.problems[name]
        memory = history.copied_memory()
        found, settings = self._gradient(name, players, memory, keep_graph=keep_graph)
        # All solves are noted, also those of an update that is left out, or of a player's move.
        self._note_solves(found, record)

        # Nothing has moved yet: an update that is not finite leaves the problem as it was.
        norm = GradientNorm(found.gradient.values())
        finite = self.on_nonfinite is None or norm.is_finite(found.losses.values())
        if finite:
            self.skips_in_a_row[name] = 0
        else:
            history.restore_memory(memory)
            self._refuse(name, found, record)
        if problem.accumulate_solves > 1:
            mean = self._mean_of_solves(name, found, finite=finite, moves=moves)
            if mean is None:
                return
            found, norm = mean, GradientNorm(mean.gradient.values())
        elif not finite:
            return

        self._move(problem, players, found, norm, settings, record, last=last)

    def _gradient(
        self,
        name: str,
        players: tuple[str, ...],
        memory: Mapping[str, Mapping[str, Tensor]],
        *,
        keep_graph: bool,
    ) -> tuple[TotalGradient, Mapping[str, Mapping[str, Any]]]:
        """Draws batches; returns the total gradient, and the settings of the step.

        An update happens completely or not at all. So if this raises, what it has drawn or moved is
        put back: the same batches and noise come again, and the engines' memory is as it was.
        """
        history, problem = self._history, self._history.graph.problems[name]
        taken = self.draw(name)
        batches = taken.batches
        history.taken_for_solves.clear()
        if self._parallel is not None and history.updates[name] == 0:
            self._parallel.warn_of_equal_batches(name, tensors_of(batches))
        random = RandomState.capture(problem.generators)
        levels = self._levels[name]
        known = levels.copied_solutions()
        before = self._watched(problem)
        try:
            found = levels.differentiate(
                name,
                batches,
                is_update=True,
                players=players,
                keep_graph=keep_graph,
                begun=random,
            )
            settings: Mapping[str, Mapping[str, Any]] = {}
            try:
                self._check_unmoved(problem, before)
                if problem.settings is not None:
                    settings = self._set(problem, found.evaluation)
            except BaseException:
                restore_buffers(found.evaluation)
                raise
        except BaseException as error:
            history.streams[name].put_back(taken)
            for stream, others in reversed(history.taken_for_solves):
                stream.put_back(others)
            # Solutions that were made for it go, since they would be made again with other draws.
            levels.restore_solutions(known)
            random.restore(problem.generators)
            history.restore_memory(memory)
            if not isinstance(error, NotCountable):
                raise
        else:
            history.taken_for_solves.clear()
            return found, settings
        return self._gradient(name, players, memory, keep_graph=keep_graph)

    def _move(
        self,
        problem: Problem,
        players: tuple[str, ...],
        found: TotalGradient,
        norm: GradientNorm,
        settings: Mapping[str, Mapping[str, Any]],
        record: Record,
        *,
        last: bool,
    ) -> None:
        """Makes the step down a gradient, calls what follows it, and records the update."""
        history, name = self._history, problem.name
        engine = history.step_engines[name] if last else None
        step, raised = self._step(problem, found, norm, engine, settings)
        # Parameters have moved by now. So whatever is raised, the update is made: it is recorded,
        # and the next call does not make it again.
        try:
            if problem.after_step is not None:
                self._finish(problem, found.evaluation, players)
            if problem.schedulers:
                _move_schedulers(problem, found, players)
            if raised is not None:
                raise raised
        finally:
            history.updates[name] += 1
            history.mark(name)
            if history.estimates or history.averages:
                history.keep(name)
            if last:
                history.note(name, found, step)
                self._note(problem, found, norm, record)
        if problem.after_update is not None:
            self._call_after(problem, problem.after_update)

    def _mean_of_solves(
        self, name: str, found: TotalGradient, *, finite: bool, moves: bool
    ) -> TotalGradient | None:
        """Adds the gradient of one solve (`accumulate_solves`); returns the mean at the last.

        None: the problem does not move yet, or no gradient was finite.
        """
        sums = self._history.sums.setdefault(name, SolveSums())
        if finite:
            sums.add(found)
        if not moves:
            return None
        del self._history.sums[name]
        return sums.mean(found) if sums.count else None

    def draw(self, name: str) -> Taken:
        """Takes the batches of one update.

        Raises:
            ProblemError: if drawing a batch changed an earlier one.
        """
        return self._history.streams[name].take(self._history.graph.problems[name].accumulate)

    # ------------------------------ the step, and the user's hooks around it

    def _set(self, problem: Problem, evaluation: Evaluation) -> dict[str, dict[str, Any]]:
        """Finds the settings of this step, and writes those that are numbers to the optimizers."""
        self._step_checks.check_bare(problem)
        with torch.no_grad(), evaluation.replayed_at({}, evaluation.current_reads()):
            found = evaluation.loss.settings(evaluation.made)
        check_values(problem.name, found)
        check_schedulers(problem, found)
        name_of = {id(parameter): key for key, parameter in problem.parameters.items()}
        for optimizer in problem.optimizers.values():
            for group in optimizer.param_groups:
                members = [found[name_of[id(p)]] for p in group["params"] if id(p) in name_of]
                group.update(common_numbers(members))
        return found

    def _finish(self, problem: Problem, evaluation: Evaluation, players: tuple[str, ...]) -> None:
        """Applies `after_step` to the parameters that the players have moved."""
        reads = evaluation.current_reads()
        live = problem.parameters
        before = dict(zip(live, copies(live.values()), strict=True))
        if problem.name in self._history.differentiated:
            self._step_checks.check_after_step(problem, evaluation, before, reads)
        with torch.no_grad():
            after = evaluation.after_step(dict(before), reads)
            for player in players:
                for key in problem.player_parameters[player]:
                    problem.parameters[key].copy_(after[key])

    def _step(
        self,
        problem: Problem,
        found: TotalGradient,
        norm: GradientNorm,
        engine: StepEngine | None,
        settings: Mapping[str, Mapping[str, Any]],
    ) -> tuple[OptimizerStep | None, BaseException | None]:
        """Clips the gradient and lets the optimizers move; leaves no gradient behind.

        Args:
            problem: which moves.
            found: its total gradient.
            norm: of that.
            engine: what differentiates this step; None: nothing does.
            settings: those of this step, where they are learned.

        Returns:
            What the engine needs of the step; and what was raised once parameters had moved, by a
            hook after a step, for example. That is to be raised when the update is complete.
        """
        gradient = found.gradient
        by_formula = problem.settings is not None
        is_checked = engine is not None and not by_formula and self._step_checks.are_due(problem)
        if problem.grad_clip is not None:
            gradient = clip_by_norm(gradient, problem.grad_clip, norm.total)
        elif self._may_change(problem, found, is_checked=is_checked):
            gradient = dict(zip(gradient, copies(gradient.values()), strict=True))
        optimizers = problem.optimizers.values()
        if any(map(is_fused, optimizers)):
            gradient = {key: laid_out(g, problem.parameters[key]) for key, g in gradient.items()}
        # None if the loss does not depend on a parameter: its optimizer then skips it, including
        # decay and momentum, as in plain PyTorch.
        unused = found.unused
        for key, parameter in problem.parameters.items():
            parameter.grad = None if key in unused else gradient[key]
        if problem.before_update is not None:
            self._call_before(problem, problem.before_update, engine)
        # The optimizers' state is captured before it moves, and after a hook, which may have set
        # learning rates.
        step = None if engine is None else engine.capture(problem, found.unused)
        checked: OptimizerStep | None = None
        before: Tensors = {}
        if is_checked:
            checked = OptimizerStep.capture(problem)
            # Of the live ones, since a loss may move them itself (`nn.Embedding(max_norm=…)`).
            used = [key for key in problem.parameters if key not in found.unused]
            before = {key: problem.parameters[key].detach().clone() for key in used}

        kept = self._kept_in_groups(problem)
        raised = None
        if by_formula:
            made = OptimizerStep.capture(problem, unused=found.unused).with_settings(settings)
            made.make(problem)
        else:
            raised = _make_steps(problem)
        for parameter in problem.parameters.values():
            parameter.grad = None
        self._check_groups(problem, kept)

        if checked is not None and engine is not None:
            bare = {key: found.gradient[key] for key in before}
            advice = self._history.losses[problem.name].advice
            self._step_checks.check(
                problem, engine, checked, before=before, gradient=bare, advice=advice
            )
        return step, raised

    @staticmethod
    def _kept_in_groups(problem: Problem) -> list[tuple[Optimizer, dict[str, Any]]]:
        """The entries of the groups of own optimizers that a restart should make fresh."""
        found: list[tuple[Optimizer, dict[str, Any]]] = []
        if problem.restart_from is not None:
            for optimizer in filter(is_foreign, problem.optimizers.values()):
                found += [(optimizer, copied_options(g)) for g in optimizer.param_groups]
        return found

    @staticmethod
    def _check_groups(problem: Problem, kept: list[tuple[Optimizer, dict[str, Any]]]) -> None:
        """Refuses an optimizer that keeps state where a restart does not find it."""
        now = Updater._kept_in_groups(problem)
        for (optimizer, before), (_, after) in zip(kept, now, strict=True):
            for key, value in after.items():
                if key not in before or not _same(before[key], value):
                    raise ProblemError(
                        f"Problem {problem.name!r} restarts with a fresh optimizer, but a step of "
                        f"its {type(optimizer).__name__} has changed {key!r} of a group, which a "
                        "restart leaves as it is, since settings such as the learning rate are "
                        "there too. Let the optimizer keep it in `state`."
                    )

    @staticmethod
    def _may_change(problem: Problem, found: TotalGradient, *, is_checked: bool) -> bool:
        """Whether the step may change gradients in place that are needed later."""
        # The derivative may need them. (Autograd also gives one tensor to several parameters, as
        # of a + b, or an expanded one.)
        optimizers = problem.optimizers.values()
        if found.graph is None and not is_checked and not any(map(is_foreign, optimizers)):
            return False
        return problem.before_update is not None or not all(map(leaves_gradients, optimizers))

    def _call_before(
        self, problem: Problem, hook: Callable[[Problem], object], engine: StepEngine | None
    ) -> None:
        """Calls `before_update`; if an engine differentiates the step, it may change nothing."""
        if engine is None:
            hook(problem)
            return
        before = {
            key: None if parameter.grad is None else parameter.grad.clone()
            for key, parameter in problem.parameters.items()
        }
        seen = self._copied_values(problem)
        hook(problem)
        for key, parameter in problem.parameters.items():
            if not _equal(before[key], parameter.grad):
                raise ProblemError(
                    f"before_update of problem {problem.name!r} changed the gradient of {key!r}, "
                    f"and the engine {engine.label!r} differentiates the step, in which the change "
                    "would be missing. Put the change into the loss or the optimizer (grad_clip= "
                    "clips), or give the problem an engine that does not differentiate steps"
                    + self._history.losses[problem.name].advice.phrase(
                        ", such as {}", *WITHOUT_STEPS
                    )
                    + "."
                )
        changed = self._changed_value(problem, seen)
        if changed:
            raise ProblemError(
                f"before_update of problem {problem.name!r} changed {changed}, and the engine "
                f"{engine.label!r} differentiates the step from the gradient that was taken before "
                "the change. Change values between rounds, make the change part of the loss, of "
                "the optimizer or of after_step=, or give the problem the engine 'first_order'."
            )

    def _call_after(self, problem: Problem, hook: Callable[[Problem], object]) -> None:
        """Calls `after_update`, which may not move a solution that is differentiated."""
        if problem.name not in self._history.differentiated:
            hook(problem)
            self._history.mark(problem.name)
            return
        # A change would be missing in the derivative, so it is refused instead of differentiated.
        seen = self._copied_values(problem)
        hook(problem)
        changed = self._changed_value(problem, seen)
        if changed:
            raise ProblemError(
                f"after_update of problem {problem.name!r} changed {changed}, and the engine "
                f"{self._history.engines[problem.name].label!r} differentiates its solution, in "
                "which the change would be missing. Make the change part of the loss, of the "
                "optimizer or of after_step=, or give the problem the engine 'first_order'."
            )

    def _watched(self, problem: Problem) -> _Watched | None:
        """What to compare a problem's parameters with after its loss was evaluated.

        None if the loss may move them: its solution is not differentiated, or one step of it from a
        start that is a constant, as the moved start is too. Sharded parameters are not compared.
        """
        engine = self._history.engines[problem.name]
        one = isinstance(engine, StepEngine) and engine.recorded_steps == 1
        if problem.name not in self._history.differentiated or (one and not problem.restart_from):
            return None
        if self._history.losses[problem.name].sharded:
            return None
        parameters = problem.parameters.values()
        # Versions do not tell of changes by `.data`, nor whether a value is another one.
        due = self._history.losses[problem.name].checks.is_due("moves in its loss")
        values = copies(parameters) if due or problem.name in self._written else None
        return _Watched([parameter._version for parameter in parameters], values)

    def _check_unmoved(self, problem: Problem, before: _Watched | None) -> None:
        """Refuses a loss that moves a solution where the move would be missing in its derivative.

        Raises:
            ProblemError: naming the parameter.
        """
        if before is None:
            return
        parameters = problem.parameters
        if before.values is None:
            versions = [parameter._version for parameter in parameters.values()]
            if versions != before.versions:
                self._written.add(problem.name)  # from the next update on, values are compared
            return
        for (key, parameter), value in zip(parameters.items(), before.values, strict=True):
            if not _unchanged(value, parameter):
                raise ProblemError(
                    f"The loss of problem {problem.name!r} changes its parameter {key!r} in place, "
                    f"and the engine {self._history.engines[problem.name].label!r} differentiates "
                    "its solution, in which the change would be missing. Compute with a changed "
                    "copy (for max_norm= of an embedding: scale the rows that it returns), project "
                    "in after_step=, or give the problem the engine 'first_order'."
                )

    def _copied_values(self, problem: Problem) -> dict[str, Tensors]:
        """Problem → copies of its parameters: this one, and all that its solution depends on."""
        copied: dict[str, Tensors] = {}
        for name in (problem.name, *self._history.graph.reads[problem.name]):
            live = self._history.graph.problems[name].parameters
            copied[name] = dict(zip(live, copies(live.values()), strict=True))
        return copied

    def _changed_value(self, problem: Problem, before: Mapping[str, Tensors]) -> str:
        """The first parameter that is not as it was, in words; empty if all are."""
        for name, copied in before.items():
            for key, parameter in self._history.graph.problems[name].parameters.items():
                if not torch.equal(copied[key], parameter):
                    if name == problem.name:
                        return f"its parameter {key!r}"
                    return f"the parameter {key!r} of problem {name!r}, which it reads"
        return ""

    # ------------------------------ records, warnings and refusals

    @torch.no_grad()
    def _refuse(self, name: str, found: TotalGradient, record: Record) -> None:
        """Skips an update whose gradient is not finite.

        Raises:
            NonFiniteError: unless the policy is to skip, and not too many in a row were skipped.
        """
        history, graph, levels = self._history, self._history.graph, self._levels[name]
        problem = graph.problems[name]
        if found.graph is not None:
            found.graph.release()
        restore_buffers(found.evaluation)

        # To find the term that is not finite, the gradient is repeated with fewer and fewer terms.
        def again(held_constant: frozenset[str]) -> Tensors:
            with levels.unchanged():
                found.evaluation.random_states[0].restore(problem.generators)
                return levels.differentiate(
                    name, found.evaluation.batches, held_constant=held_constant
                ).gradient

        differentiated = history.differentiated.intersection(graph.solutions_in[name])
        error = nonfinite_error(
            problem,
            found,
            round_number=history.round + 1,
            update=history.updates[name] + 1,
            lowers=[other for other in graph.problems if other in differentiated],
            reads={other: graph.problems[other] for other in graph.reads[name]},
            gradient=again,
        )
        self.skips_in_a_row[name] += 1
        if self.on_nonfinite != "skip" or self.skips_in_a_row[name] > SKIPS_IN_A_ROW:
            raise error
        record.skipped[name] = error

    def _note(
        self, problem: Problem, found: TotalGradient, norm: GradientNorm, record: Record
    ) -> None:
        """Writes an update to the record."""
        players: dict[str, Tensor] = {}
        if problem.is_game:
            for player, keys in problem.player_parameters.items():
                players[player] = total_norm([found.gradient[key] for key in keys])
        record.add(
            problem.name,
            loss=found.losses if problem.is_game else found.losses[problem.name],
            metrics=found.metrics,
            gradient_norm=norm,
            player_norms=players or None,
        )

    def _note_solves(self, found: TotalGradient, record: Record) -> None:
        """Writes solves into the record; warns once per problem of a failed one."""
        for report in found.reports:
            record.add_solve(report)
            if report.failed and report.problem not in self._warned:
                self._warned.add(report.problem)
                residual = ""
                if report.residual is not None:
                    residual = f" (relative residual {report.residual:.2g})"
                warn_user(
                    f"Engine {report.engine!r} did not converge on problem "
                    f"{report.problem!r}{residual}. {report.advice} Later failures on this problem "
                    "are only in the records."
                )


def _make_steps(problem: Problem) -> BaseException | None:
    """Lets all optimizers move; returns the first error of a step that has moved parameters.

    The others move all the same, since such an update counts as made. An error before anything has
    moved is raised.
    """
    parameters = problem.parameters.values()
    versions = [parameter._version for parameter in parameters]
    first: BaseException | None = None
    for optimizer in problem.optimizers.values():
        try:
            _make_step(optimizer, problem)
        except BaseException as error:
            if versions == [parameter._version for parameter in parameters]:
                raise
            first = error if first is None else first
    return first


def _make_step(optimizer: Optimizer, problem: Problem) -> None:
    """Lets one of a problem's optimizers move."""
    with _raised_in(f"the step of {type(optimizer).__name__}", problem):
        if innermost(optimizer).defaults.get("differentiable"):
            with plain_steps(optimizer):
                optimizer.step()
        else:
            make_step(optimizer)


def _move_schedulers(problem: Problem, found: TotalGradient, players: tuple[str, ...]) -> None:
    """Moves the learning-rate schedulers, except those of players that rested."""
    for name, scheduler in problem.schedulers.items():
        if _rests(problem, name, scheduler, players):
            continue
        with _raised_in(f"the step of {type(scheduler).__name__}", problem):
            if isinstance(scheduler, ReduceLROnPlateau):
                loss = found.losses.get(name)
                scheduler.step(float(sum(found.losses.values()) if loss is None else loss))
            else:
                scheduler.step()


@contextmanager
def _raised_in(place: str, problem: Problem) -> Iterator[None]:
    """Says of an error of foreign code where it was raised, and how that code is called."""
    try:
        yield
    except Exception as error:
        error.add_note(
            f"It was raised in {place} for problem {problem.name!r}. Steps are made by `step()`, "
            "without arguments; gradients have no graph then."
        )
        raise


def _rests(problem: Problem, name: str, scheduler: Any, players: tuple[str, ...]) -> bool:
    """Whether a scheduler belongs to players that did not move."""
    if len(players) == len(problem.players):
        return False
    if name in problem.players:
        return name not in players
    # The optimizer of a scheduler in a list shows whose it is.
    moved: set[int] = set()
    for player in players:
        moved.update(id(problem.parameters[key]) for key in problem.player_parameters[player])
    driven = getattr(scheduler, "optimizer", None)
    groups = [] if driven is None else driven.param_groups
    held = {id(parameter) for group in groups for parameter in group["params"]}
    return bool(held) and not held & moved


def _same(one: Any, other: Any) -> bool:
    """Whether two entries of a group are equal, where they are tensors or plain values."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    return one is other or (type(one) is type(other) and bool(one == other))


def _unchanged(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same values, of which some may be NaN."""
    return bool(((one == other) | (one.isnan() & other.isnan())).all())


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)
