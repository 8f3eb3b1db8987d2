"""What a person sees while a run goes on: bars in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["PhaseProgress"]

PLAIN_INTERVAL = 10.0
"""Seconds between two lines where the output is not a terminal."""


class PhaseProgress:
    """The progress of one phase.

    Args:
        console: where it is shown.
        name: of the phase.
        total: steps of it.
        done: steps that were done before (a resumed run).
    """

    def __init__(self, console: Console, name: str, total: int, done: int = 0) -> None:
        self._console = console
        self._name, self._total = name, total
        self._started, self._begun_at = time.monotonic(), done
        self._last_line = 0.0
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task(name, total=total, completed=done, text="")

    def __enter__(self) -> PhaseProgress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def update(self, done: int, values: dict[str, Any]) -> None:
        """Shows that `done` steps are complete, with the latest values (name → text or number)."""
        text = "  ".join(
            f"{key} {value:.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in values.items()
        )
        if self._bar is not None:
            self._bar.update(self._task, completed=done, text=text)
            return
        now = time.monotonic()
        if now - self._last_line < PLAIN_INTERVAL and done < self._total:
            return
        self._last_line = now
        rate = (now - self._started) / max(1, done - self._begun_at)
        left = f"{rate * (self._total - done):.0f} s left"
        self._console.print(f"{self._name} {done}/{self._total}  {text}  {left}", highlight=False, soft_wrap=True)
