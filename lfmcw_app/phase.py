"""The one loop of a run: the rounds of a phase, and what each of them logs, saves and shows."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from rich.console import Console

from lfmcw_app import stopping
from lfmcw_app.errors import InputError, NumbersWarning, listed, shown
from lfmcw_app.printing import say
from lfmcw_app.processes import all_gathered, wait_for_all
from lfmcw_app.progress import PhaseProgress
from lfmcw_app.resuming import learning_rates, set_learning_rates
from lfmcw_app.run_files import TIMINGS
from lfmcw_app.run_folder import RunFolder
from lfmcw_app.search_space.genotype import Cells
from lfmcw_app.timings import MEASURING, Timings
from mlo import CheckpointError, MultilevelOptimizer, NonFiniteError, Record

__all__ = ["Phase", "PhaseState", "Round", "entry_of"]


@dataclass(frozen=True, kw_only=True)
class PhaseState:
    """The state of a phase besides its optimizer, saved with it.

    Attributes:
        loss_sum: sum of the losses over the rounds since the last due checkpoint.
        loss_count: number of these rounds.
        best: lowest mean of such losses so far; None before the first.
        rollbacks: how often the run returned to the last due checkpoint.
    """

    loss_sum: float = 0.0
    loss_count: int = 0
    best: float | None = None
    rollbacks: int = 0

    @classmethod
    def read(cls, saved: dict[str, Any]) -> PhaseState:
        """Reads it from a checkpoint.

        Raises:
            CheckpointError: if that is something else.
        """
        kinds = {"loss_sum": float, "loss_count": int, "best": float, "rollbacks": int}
        for key, value in saved.items():
            unset = key == "best" and value is None
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            of_kind = is_number and (kinds.get(key) is float or isinstance(value, int))
            if key not in kinds or not (unset or of_kind):
                raise CheckpointError(
                    f"The checkpoint's entry standing.{key} is {shown(value)}, which no run "
                    "writes, so it was edited. Use an earlier checkpoint, or a new folder."
                )
        return cls(**saved)


@dataclass(frozen=True, kw_only=True)
class Round:
    """A round of a phase that was run but not yet logged, saved and shown.

    Attributes:
        record: the optimizer's record of it.
        is_due: whether a checkpoint belongs to its end.
        entry: its line in metrics.jsonl; what the loop adds is logged too.
        shown: numbers that are shown beside the losses, by name, filled in by the loop.
    """

    record: Record
    is_due: bool
    entry: dict[str, Any]
    shown: dict[str, float] = field(default_factory=dict)


SAVE_AFTER = 120.0
"""Seconds without a checkpoint after which the next round ends with one, due or not."""

ROLLBACKS = 3
"""How often a run returns to the same checkpoint after losing numbers."""


class Phase:
    """A phase of a run, resumed from its checkpoint.

    Args:
        folder: of the run.
        name: of the phase, in its checkpoints, in metrics.jsonl and in timings.jsonl.
        optimizer: the one to run; it is moved to the phase's checkpoint.
        rounds: number of rounds of the phase.
        save_every: rounds between checkpoints.
        phases: all phases of the run, in their order.
        judged_by: the problem whose mean loss decides which checkpoint is the best; None if there
            is no best, as in a game.
        console: where progress is shown.
        device: where the updates run.
    """

    def __init__(
        self,
        folder: RunFolder,
        name: str,
        optimizer: MultilevelOptimizer,
        *,
        rounds: int,
        save_every: int,
        phases: tuple[str, ...],
        judged_by: str | None,
        console: Console,
        device: torch.device,
    ) -> None:
        self._folder, self._name, self._optimizer = folder, name, optimizer
        self._rounds, self._save_every = rounds, save_every
        self._judged_by, self._console = judged_by, console
        self._keep_every = folder.recipe.checkpoint_keep_every
        self._rates = learning_rates(optimizer)
        self._state = PhaseState.read(folder.restore(name, optimizer, phases))
        set_learning_rates(optimizer, self._rates)
        self._take_up_changes(last=name == phases[-1])
        self._saved_at = time.monotonic()
        if optimizer.round:
            self._record_saved()
        wait_for_all()

        # After `restore`: intervals are counted from the round that the phase resumes at.
        self._timings = Timings(folder.path, name, optimizer, device)

        # The optimizer's own rollback would return to a state in memory, not to the checkpoint.
        self._rolls_back = folder.recipe.on_nonfinite == "rollback"
        optimizer.on_nonfinite = "skip" if folder.recipe.on_nonfinite == "skip" else "stop"
        if self._rolls_back and optimizer.round == 0:
            self._save(self._state, must=True)

    def _take_up_changes(self, *, last: bool) -> None:
        """Records what was changed, if the phase has rounds to come."""
        done = self._optimizer.round
        if done > self._rounds:
            raise InputError(
                f"{self._name} has already made {done} rounds, so it cannot have only "
                f"{self._rounds}. A phase can be made longer, or end at its current round, but no "
                "earlier."
            )
        if self._folder.changes and (last or done < self._rounds):
            for change in self._folder.changes:
                say(self._console, f"Changed after round {done} of {self._name}: {change}")
            self._folder.record_changes(self._name, done)

    def rounds(
        self,
        before_round: Callable[[], None] | None = None,
        cells: Callable[[], Cells] | None = None,
    ) -> Iterator[Round]:
        """Runs the remaining rounds; each is logged and saved when the next is requested.

        Args:
            before_round: is called at the beginning of each round.
            cells: derives the cell that is shown with the progress.

        Raises:
            Stopped: after a checkpoint, if a signal asked for it.
            InputError: if a loss or gradient is not finite and the recipe says stop, or nothing
                else helped; if the state of the last round cannot be written, or no state could be
                for a long time.
        """
        optimizer = self._optimizer
        with PhaseProgress(self._console, self._name, self._rounds, optimizer.round) as progress:
            while optimizer.round < self._rounds:
                if before_round is not None:
                    before_round()
                record = self._step()
                if record is None:
                    continue
                done = Round(
                    record=record,
                    is_due=self._is_due(record.round),
                    entry={"phase": self._name, **entry_of(record)},
                )
                yield done
                self._finish(done)
                progress.update(record.round, record.losses, done.shown, cells)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Says that the generator is measured, which may take longer than a round, and times it."""
        say(
            self._console,
            f"Measuring the generator after round {self._optimizer.round:,} of the {self._name}: "
            "small classifiers learn from its pictures and from real ones …",
        )
        with self._timings.beside(MEASURING):
            yield

    def _step(self) -> Record | None:
        """Runs a round; None if the run returned to its last checkpoint instead."""
        try:
            record = self._optimizer.step()
        except NonFiniteError as error:
            told = f"{error} {self._folder.save_diagnosis(error)}"
            if not self._rolls_back:
                raise InputError(f"{told} {self._way_out(error)}") from error
            self._roll_back(told)
            return None
        for skipped in record.skipped.values():
            warnings.warn(
                f"{skipped} {self._folder.save_diagnosis(skipped)}", NumbersWarning, stacklevel=3
            )
        return record

    def _way_out(self, error: NonFiniteError) -> str:
        """What a user can do about numbers that a run has lost."""
        if error.data["nonfinite_tensors"]:
            return (
                "The run is stopped. Its state was lost before this round, so its checkpoint may "
                f"be useless. To repeat {self._name} from its beginning, delete {self._name}*.pt "
                f"in {self._folder.path} and resume with better settings, such as --set "
                "search.weights.lr=…"
            )
        return (
            "The run is stopped. Its last checkpoint is from an earlier round. Resume from there "
            "with other settings: --set on_nonfinite=rollback, or a lower learning rate."
        )

    def _roll_back(self, told: str) -> None:
        """Returns to the last checkpoint, to continue with other batches and noise.

        See `roll_back` of mlo.
        """
        state = self._folder.roll_back(self._name, self._optimizer)
        set_learning_rates(self._optimizer, self._rates)
        wait_for_all()
        self._state = PhaseState.read(state)
        if self._state.rollbacks == ROLLBACKS:
            raise InputError(
                f"{told} The run has gone back to round {self._optimizer.round} of {self._name} "
                f"{ROLLBACKS} times, so it is stopped."
            )
        self._state = replace(self._state, rollbacks=self._state.rollbacks + 1)

        # A run that is resumed from here then has the same batches ahead.
        self._save(self._state, must=True)
        warnings.warn(
            f"{told} The run goes back to round {self._optimizer.round} of {self._name}, with "
            f"other batches and noise ({self._state.rollbacks} of {ROLLBACKS} times).",
            NumbersWarning,
            stacklevel=4,
        )

    def _is_due(self, round_number: int) -> bool:
        return round_number == self._rounds or round_number % self._save_every == 0

    def _finish(self, done: Round) -> None:
        """Logs a round, writes what is due after it, and stops if a signal asked for it."""
        record, due = done.record, done.is_due
        self._folder.log(done.entry)
        loss = None if self._judged_by is None else record.losses.get(self._judged_by)
        if loss is not None:
            state = self._state
            self._state = replace(
                state, loss_sum=state.loss_sum + loss, loss_count=state.loss_count + 1
            )
        if due:
            self._save_due(record.round, last=record.round == self._rounds)

        # Rounds that take minutes are saved between due checkpoints too. Processes share the
        # requests they got, so that all save and stop after the same round.
        overdue = time.monotonic() - self._saved_at > SAVE_AFTER
        asked = all_gathered((stopping.requested(), overdue))
        received = next((number for number, _ in asked if number is not None), None)
        if received is not None:
            stopping.settled()
        if not due and (received is not None or any(late for _, late in asked)):
            self._save(self._state, must=received is not None)
        if received is not None:
            raise stopping.Stopped(received)

    def _save_due(self, round_number: int, *, last: bool) -> None:
        """Saves a checkpoint that is due; if it was written, the mean of the losses restarts."""
        now = self._state
        mean = now.loss_sum / now.loss_count if now.loss_count else None
        better = mean is not None and (now.best is None or mean < now.best)
        keep = self._keep_every and (round_number // self._save_every) % self._keep_every == 0
        state = PhaseState(best=mean if better else now.best)
        if self._save(state, must=last, best=better, keep_as=round_number if keep else None):
            self._state = state

    def _save(
        self, state: PhaseState, *, must: bool, best: bool = False, keep_as: int | None = None
    ) -> bool:
        """Saves a checkpoint, and the times of the rounds since the last one.

        Raises:
            InputError: if it would hold parameters that are not finite.
        """
        self._check_finite()
        self._saved_at = time.monotonic()
        if self._folder.writes:
            with self._folder.attempting(TIMINGS):
                self._timings.write()
        written = self._folder.save(
            self._name, self._optimizer, asdict(state), must=must, best=best, keep_as=keep_as
        )
        if written:
            self._record_saved()
        return written

    def _record_saved(self) -> None:
        done, total = self._optimizer.round, self._rounds
        stopping.record_saved(f"the end of round {done:,} of {total:,} of the {self._name}")

    def _check_finite(self) -> None:
        """A generator whose pictures are all white has a finite loss, whatever its parameters are.

        The sound checkpoint before would be replaced by one that no run can resume from.
        """
        lost = [
            f"{name}.{key}"
            for name, problem in self._optimizer.problems.items()
            for key, parameter in problem.parameters.items()
            if not bool(parameter.detach().isfinite().all())
        ]
        if lost:
            raise InputError(
                f"Round {self._optimizer.round} of {self._name}: {listed(lost)} are not finite, "
                "though all losses are. They are not saved, and the last checkpoint stands. Resume "
                "from it with other settings, such as a lower learning rate."
            )


def entry_of(record: Record) -> dict[str, Any]:
    """A record as plain data. Nothing in it depends on the clock, so equal runs log equal lines."""
    entry: dict[str, Any] = {
        "round": record.round,
        "losses": record.losses,
        "metrics": record.metrics,
        "gradient_norms": record.gradient_norms,
    }
    if record.player_gradient_norms:
        entry["player_gradient_norms"] = record.player_gradient_norms
    entry["solves"] = {
        name: {
            "engine": report.engine,
            "iterations": report.iterations,
            "residual": report.residual,
            "converged": report.converged,
            "failed": report.failed,
        }
        for name, report in sorted(record.solves.items())
    }
    if record.skipped:
        entry["skipped"] = {name: error.term for name, error in record.skipped.items()}
    return entry
