"""One update of a problem: draw batches, differentiate, check the numbers, clip, step, record."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from mlo.bare_step import leaves_gradients, make_step
from mlo.batches import Taken
from mlo.distributed import DataParallel
from mlo.errors import NonFiniteError, warn_user
from mlo.gradient_norm import GradientNorm, clip_by_norm, total_norm
from mlo.graph_memory import NotCountable
from mlo.history import History
from mlo.inner_optimizer import innermost, is_foreign
from mlo.levels import Levels
from mlo.move_checks import MoveChecks, check_groups, kept_in_groups
from mlo.nonfinite import SKIPS_IN_A_ROW, OnNonFinite, nonfinite_error
from mlo.optimizer_step import OptimizerStep, plain_steps
from mlo.optimizer_traits import is_fused
from mlo.problem import Problem, Tensors
from mlo.randomness import RandomState
from mlo.records import Record
from mlo.solution import Evaluation, StepEngine, restore_buffers
from mlo.solve_sums import SolveSums
from mlo.step_checks import StepChecks, check_schedulers
from mlo.step_formulas import check_values, common_numbers
from mlo.tensors import copies, laid_out, tensors_of
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
        self._move_checks = MoveChecks(history)
        self._warned: set[str] = set()

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
        before = self._move_checks.watched(problem)
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
                self._move_checks.check_unmoved(problem, before)
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
            self._move_checks.call_after(problem, problem.after_update)

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
            self._move_checks.call_before(problem, problem.before_update, engine)
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

        kept = kept_in_groups(problem)
        raised = None
        if by_formula:
            made = OptimizerStep.capture(problem, unused=found.unused).with_settings(settings)
            made.make(problem)
        else:
            raised = _make_steps(problem)
        for parameter in problem.parameters.values():
            parameter.grad = None
        check_groups(problem, kept)

        if checked is not None and engine is not None:
            bare = {key: found.gradient[key] for key in before}
            advice = self._history.losses[problem.name].advice
            self._step_checks.check(
                problem, engine, checked, before=before, gradient=bare, advice=advice
            )
        return step, raised

    @staticmethod
    def _may_change(problem: Problem, found: TotalGradient, *, is_checked: bool) -> bool:
        """Whether the step may change gradients in place that are needed later."""
        # The derivative may need them. (Autograd also gives one tensor to several parameters, as
        # of a + b, or an expanded one.)
        optimizers = problem.optimizers.values()
        if found.graph is None and not is_checked and not any(map(is_foreign, optimizers)):
            return False
        return problem.before_update is not None or not all(map(leaves_gradients, optimizers))

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
