"""Measures the updates of each problem: time and memory, one line per interval.

They are not in metrics.jsonl, because they are not a function of recipe and seed: a repeated run
has other times. A resumed run adds the time actually spent, repeated rounds included.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lfmcw_app.run_files import TIMINGS
from mlo import MultilevelOptimizer, Problem

__all__ = ["MEASURING", "Timings"]

MEASURING = "measuring the generator"
"""Work beside the updates that may take longer than they do."""

CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass
class _Taken:
    """The cost of a problem's updates in an interval."""

    updates: int = 0
    seconds: float = 0.0
    peak_bytes: int | None = None


class Timings:
    """Measures every update of an optimizer's problems, and writes sums over intervals.

    Args:
        folder: where timings.jsonl is.
        phase: of the run.
        optimizer: whose updates are measured.
        device: where they run. On a GPU time is measured by events, which wait for nothing until an
            interval is written.
    """

    def __init__(
        self, folder: Path, phase: str, optimizer: MultilevelOptimizer, device: torch.device
    ) -> None:
        self._path = folder / TIMINGS
        self._phase, self._optimizer = phase, optimizer
        self._cuda = device.type == "cuda"
        self._resets_peak = self._cuda or _can_reset_peak()
        self._begun, self._round = time.perf_counter(), optimizer.round
        self._taken: dict[str, _Taken] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self._beside: dict[str, float] = {}
        optimizer.around_update = self.update

    @contextmanager
    def update(self, problem: str) -> Iterator[None]:
        """Measures the body as an update of a problem."""
        taken = self._taken.setdefault(problem, _Taken())
        self._reset_peak()
        begun = time.perf_counter()
        events = _events() if self._cuda else None
        if events is not None:
            events[0].record()
        yield
        if events is not None:
            events[1].record()
            self._events.append((problem, *events))
        else:
            taken.seconds += time.perf_counter() - begun
        taken.updates += 1
        peak = self._peak()
        if peak is not None:
            taken.peak_bytes = max(peak, taken.peak_bytes or 0)

    @contextmanager
    def beside(self, what: str) -> Iterator[None]:
        """Measures the body as other work of the rounds, under the name `what`."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            taken = time.perf_counter() - begun
            self._beside[what] = self._beside.get(what, 0.0) + taken

    def write(self) -> None:
        """Adds a line for the rounds since the last one; none if no round has ended since."""
        if self._optimizer.round <= self._round:
            return  # also after a return to a checkpoint: its rounds have their line
        # The CPU waits for the GPU only here.
        for problem, begin, end in self._events:
            end.synchronize()
            self._taken[problem].seconds += begin.elapsed_time(end) / 1000.0
        self._events.clear()
        now = time.perf_counter()
        entry = {
            "phase": self._phase,
            "rounds": [self._round + 1, self._optimizer.round],
            "seconds": round(now - self._begun, 4),
            "problems": {
                name: {
                    "updates": taken.updates,
                    "seconds": round(taken.seconds, 4),
                    "peak_bytes": taken.peak_bytes,
                    "held_bytes": held_bytes(self._optimizer.problems[name]),
                }
                for name, taken in self._taken.items()
            },
            "beside": {what: round(taken, 4) for what, taken in self._beside.items()},
        }
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
        self._begun, self._round = now, self._optimizer.round
        self._taken, self._beside = {}, {}

    def _reset_peak(self) -> None:
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
        elif self._resets_peak:
            CLEAR_REFS.write_text("5")  # the peak of the resident set begins again (proc(5))

    def _peak(self) -> int | None:
        """Peak memory since the last reset, in bytes; None if it cannot be reset."""
        if self._cuda:
            return torch.cuda.max_memory_allocated()
        if not self._resets_peak:
            return None
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024


def _events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    begin = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    return begin, end


def _can_reset_peak() -> bool:
    try:
        CLEAR_REFS.write_text("5")
    except OSError:  # not Linux, or not allowed
        return False
    return "VmHWM" in STATUS.read_text()


def held_bytes(problem: Problem) -> int:
    """Bytes a problem keeps between updates: parameters, buffers and optimizer state."""
    tensors = [*problem.module.parameters(), *problem.module.buffers()]
    for optimizer in problem.optimizers.values():
        tensors += _tensors(optimizer.state)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _tensors(state: Any) -> Iterator[Tensor]:
    for values in state.values():
        yield from (value for value in values.values() if isinstance(value, Tensor))
