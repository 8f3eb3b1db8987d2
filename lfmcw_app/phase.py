"""The rounds of one phase of a run, with checkpoints, stops by signals and lost numbers."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from lfmcw_app import stopping
from lfmcw_app.errors import InputError, NumbersWarning
from lfmcw_app.processes import all_gathered, wait_for_all
from lfmcw_app.run_folder import RunFolder
from lfmcw_app.timings import TIMINGS, Timings
from mlo import MultilevelOptimizer, NonFiniteError, Record

__all__ = ["Phase", "PhaseState", "entry_of"]


@dataclass(frozen=True, kw_only=True)
class PhaseState:
    """What a phase knows beside its optimizer, saved with it.

    Attributes:
        loss_sum: sum of the losses of the rounds since the last due checkpoint.
        loss_count: number of these rounds.
        best: lowest mean of such losses so far; None before the first.
        rollbacks: times that the run returned to the last due checkpoint.
    """

    loss_sum: float = 0.0
    loss_count: int = 0
    best: float | None = None
    rollbacks: int = 0


SAVE_AFTER = 120.0
"""Seconds without a checkpoint after which the next round ends with one, due or not."""

ROLLBACKS = 3
"""Times that a run returns to one and the same checkpoint because numbers were lost."""


class Phase:
    """A phase of a run, from where its checkpoint stands.

    Args:
        folder: of the run.
        name: of the phase; its checkpoints are called so.
        optimizer: what is run; it is moved to the phase's checkpoint.
        label: the phase's name in timings.jsonl.
        rounds: number of rounds of the phase.
        save_every: rounds between checkpoints.
        phases: all phases of the run, in their order.
        device: where the updates run.
    """

    def __init__(
        self,
        folder: RunFolder,
        name: str,
        optimizer: MultilevelOptimizer,
        *,
        label: str,
        rounds: int,
        save_every: int,
        phases: tuple[str, ...],
        device: torch.device,
    ) -> None:
        self._folder, self._name, self._optimizer = folder, name, optimizer
        self._rounds, self._save_every = rounds, save_every
        self._keep_every = folder.recipe.checkpoint_keep_every
        self._state = PhaseState(**folder.restore(name, optimizer, phases))
        self._saved_at = time.monotonic()
        wait_for_all()

        # The optimizer's own rollback would return to a state in memory, not to the checkpoint.
        self._rolls_back = folder.recipe.on_nonfinite == "rollback"
        optimizer.on_nonfinite = "skip" if folder.recipe.on_nonfinite == "skip" else "stop"
        if self._rolls_back and optimizer.round == 0:
            self._save(self._state, must=True)

        # After `restore`: intervals are counted from the round that the phase resumes at.
        self._timings = Timings(folder.path, label, optimizer, device)

    def records(self, before_round: Callable[[], None]) -> Iterator[Record]:
        """Runs the rounds that are left, and yields their records; each needs `finish_round`.

        Args:
            before_round: is called at the beginning of each round.

        Raises:
            InputError: if a loss or gradient is not finite and the recipe says stop, or nothing
                else helped.
        """
        while self._optimizer.round < self._rounds:
            before_round()
            record = self._step()
            if record is not None:
                yield record

    def _step(self) -> Record | None:
        """Runs a round; None if the run returned to its last checkpoint instead."""
        try:
            record = self._optimizer.step()
        except NonFiniteError as error:
            told = f"{error} {self._folder.save_diagnosis(error)}"
            if not self._rolls_back:
                raise InputError(
                    f"{told} The run is stopped; the last checkpoint is older."
                ) from error
            self._roll_back(told)
            return None
        for skipped in record.skipped.values():
            warnings.warn(
                f"{skipped} {self._folder.save_diagnosis(skipped)}", NumbersWarning, stacklevel=3
            )
        return record

    def _roll_back(self, told: str) -> None:
        """Returns to the last checkpoint, with other batches and noise than led away from it.

        See `roll_back` of mlo.
        """
        state = self._folder.roll_back(self._name, self._optimizer)
        wait_for_all()
        self._state = PhaseState(**state)
        if self._state.rollbacks == ROLLBACKS:
            raise InputError(
                f"{told} The run went back to round {self._optimizer.round} of {self._name} "
                f"{ROLLBACKS} times, and is stopped."
            )
        self._state = replace(self._state, rollbacks=self._state.rollbacks + 1)

        # A run that is resumed from here then has the same batches to come.
        self._save(self._state, must=True)
        warnings.warn(
            f"{told} The run goes back to round {self._optimizer.round} of {self._name}, with "
            f"other batches and noise ({self._state.rollbacks} of {ROLLBACKS} times).",
            NumbersWarning,
            stacklevel=4,
        )

    def is_due(self, round_number: int) -> bool:
        """Whether a checkpoint belongs to the end of a round."""
        return round_number == self._rounds or round_number % self._save_every == 0

    def finish_round(self, record: Record, entry: dict[str, Any], *, loss: float | None) -> None:
        """Logs a round, writes what is due after it, and stops where a signal asked for it.

        Args:
            record: of the round.
            entry: what is logged of it.
            loss: the checkpoint with the lowest mean of it is kept as the best; None where there is
                none.

        Raises:
            Stopped: after a checkpoint, if a signal asked for it.
            InputError: if the state of the phase's last round cannot be written, or none could be
                for a long time.
        """
        due = self.is_due(record.round)
        if due and self._folder.writes:
            with self._folder.attempting(TIMINGS):
                self._timings.write()
        self._folder.log(entry)
        if loss is not None:
            state = self._state
            self._state = replace(
                state, loss_sum=state.loss_sum + loss, loss_count=state.loss_count + 1
            )
        if due:
            self._save_due(record.round, last=record.round == self._rounds)

        # Rounds that take minutes are saved between due checkpoints too. Processes tell one another
        # what they were asked, so that all save and stop after the same round.
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
        """Saves a checkpoint that is due; the mean of the losses starts anew if it was written."""
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
        self._saved_at = time.monotonic()
        return self._folder.save(
            self._name, self._optimizer, asdict(state), must=must, best=best, keep_as=keep_as
        )


def entry_of(record: Record) -> dict[str, Any]:
    """A record as plain data; nothing in it depends on the clock, so equal runs log equal lines."""
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
        }
        for name, report in sorted(record.solves.items())
    }
    if record.skipped:
        entry["skipped"] = {name: error.term for name, error in record.skipped.items()}
    return entry
