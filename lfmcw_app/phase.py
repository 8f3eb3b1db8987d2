"""The rounds of one phase of a run, kept safe: checkpoints, stops by signals, numbers that are
lost.
"""

from __future__ import annotations

import time
import warnings
from dataclasses import asdict, dataclass, replace
from typing import Any

from lfmcw_app import stopping
from lfmcw_app.errors import InputError, NumbersWarning
from lfmcw_app.processes import gathered, together
from lfmcw_app.run_folder import RunFolder
from mlo import MultilevelOptimizer, NonFiniteError, Record

__all__ = ["Phase", "Standing", "entry_of"]


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What a phase knows beside its optimizer, saved with it.

    Attributes:
        loss_sum: sum of the losses of the rounds since the last due checkpoint.
        loss_count: number of these rounds.
        best: lowest mean of such losses so far; None before the first.
        rollbacks: times that the run went back to the last due checkpoint.
    """

    loss_sum: float = 0.0
    loss_count: int = 0
    best: float | None = None
    rollbacks: int = 0


SAVE_AFTER = 120.0
"""Seconds without a checkpoint after which the next round ends with one, whether it is due or
not.
"""

ROLLBACKS = 3
"""Times that a run goes back to one and the same checkpoint because numbers were lost."""


class Phase:
    """A phase of a run, from where its checkpoint stands.

    Args:
        folder: of the run.
        name: of the phase.
        optimizer: what is run; it is moved to the phase's checkpoint.
        rounds: number of rounds of the phase.
        save_every: rounds between checkpoints.
        phases: all phases of the run, in their order.
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
    ) -> None:
        self._folder, self._name, self._optimizer = folder, name, optimizer
        self._rounds, self._save_every = rounds, save_every
        self._keep_every = folder.recipe.checkpoint_keep_every
        self._standing = Standing(**folder.restore(name, optimizer, phases))
        self._saved_at = time.monotonic()
        together()
        # The optimizer's own rollback would go back to a state in memory, not to the checkpoint.
        self._rolls_back = folder.recipe.on_nonfinite == "rollback"
        optimizer.on_nonfinite = "skip" if folder.recipe.on_nonfinite == "skip" else "stop"
        if self._rolls_back and optimizer.round == 0:
            self._save(self._standing, must=True)

    def step(self) -> Record | None:
        """Runs a round; None if the run went back to its last checkpoint instead.

        Raises:
            InputError: if a loss or gradient is not finite and the recipe says stop, or nothing
                else helped.
        """
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
                f"{skipped} {self._folder.save_diagnosis(skipped)}", NumbersWarning, stacklevel=2
            )
        return record

    def _roll_back(self, told: str) -> None:
        """Goes back to the last checkpoint, with other batches and noise than led away from it; see
        `roll_back` of mlo.
        """
        standing = self._folder.roll_back(self._name, self._optimizer)
        together()
        self._standing = Standing(**standing)
        if self._standing.rollbacks == ROLLBACKS:
            raise InputError(
                f"{told} The run went back to round {self._optimizer.round} of {self._name} "
                f"{ROLLBACKS} times, and is stopped."
            )
        self._standing = replace(self._standing, rollbacks=self._standing.rollbacks + 1)
        self._save(
            self._standing, must=True
        )  # a run that is resumed from here has the same batches to come
        warnings.warn(
            f"{told} The run goes back to round {self._optimizer.round} of {self._name}, with "
            f"other batches and noise ({self._standing.rollbacks} of {ROLLBACKS} times).",
            NumbersWarning,
            stacklevel=3,
        )

    def is_due(self, round_number: int) -> bool:
        """Whether a checkpoint belongs to the end of a round."""
        return round_number == self._rounds or round_number % self._save_every == 0

    def finish_round(self, record: Record, entry: dict[str, Any], *, loss: float | None) -> None:
        """Logs a round, writes a checkpoint where one is due, and stops where a signal asked for
        it.

        Args:
            record: of the round.
            entry: what is logged of it.
            loss: by whose mean since the last checkpoint that was due the best one is known; None
                where there is none.

        Raises:
            Stopped: after a checkpoint, if a signal asked for it.
            InputError: if the state of the phase's last round cannot be written, or none could be
                for a long time.
        """
        self._folder.log(entry)
        if loss is not None:
            standing = self._standing
            self._standing = replace(
                standing, loss_sum=standing.loss_sum + loss, loss_count=standing.loss_count + 1
            )
        due = self.is_due(record.round)
        if due:
            self._save_due(record.round, last=record.round == self._rounds)
        overdue = time.monotonic() - self._saved_at > SAVE_AFTER  # rounds of minutes are not lost
        asked = gathered(
            (stopping.requested(), overdue)
        )  # all processes save and stop after the same round
        received = next((number for number, _ in asked if number is not None), None)
        if received is not None:
            stopping.settled()
        if not due and (received is not None or any(late for _, late in asked)):
            self._save(self._standing, must=received is not None)
        if received is not None:
            raise stopping.Stopped(received)

    def _save_due(self, round_number: int, *, last: bool) -> None:
        now = self._standing
        mean = now.loss_sum / now.loss_count if now.loss_count else None
        better = mean is not None and (now.best is None or mean < now.best)
        keep = self._keep_every and (round_number // self._save_every) % self._keep_every == 0
        standing = Standing(best=mean if better else now.best)
        if self._save(standing, must=last, best=better, keep_as=round_number if keep else None):
            self._standing = standing

    def _save(
        self, standing: Standing, *, must: bool, best: bool = False, keep_as: int | None = None
    ) -> bool:
        self._saved_at = time.monotonic()
        return self._folder.save(
            self._name, self._optimizer, asdict(standing), must=must, best=best, keep_as=keep_as
        )


def entry_of(record: Record) -> dict[str, Any]:
    """A record as plain data; nothing in it depends on the clock, so equal runs have equal
    files.
    """
    return {
        "round": record.round,
        "losses": record.losses,
        "metrics": record.metrics,
        "gradient_norms": record.gradient_norms,
        **(
            {"player_gradient_norms": record.player_gradient_norms}
            if record.player_gradient_norms
            else {}
        ),
        "solves": {
            name: {
                "engine": report.engine,
                "iterations": report.iterations,
                "residual": report.residual,
                "converged": report.converged,
            }
            for name, report in sorted(record.solves.items())
        },
        **(
            {"skipped": {name: error.term for name, error in record.skipped.items()}}
            if record.skipped
            else {}
        ),
    }
