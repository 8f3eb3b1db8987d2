"""What a person sees during a run: a live display in a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from lfmcw_app.printing import say
from lfmcw_app.result import edge_names
from lfmcw_app.search_space.genotype import Cells
from lfmcw_app.units import duration

__all__ = ["PhaseProgress"]

PLAIN_INTERVAL = 10.0
"""Seconds between two lines if the output is not a terminal."""
LIVE_INTERVAL = 0.5
"""Seconds between two updates in a terminal."""

MEANINGS = {
    "w1": "of network W1 on training images (D_tr)",
    "gan": "of the generator and its discriminator, which play against each other",
    "w2": "of network W2 on training images (D_tr)",
    "arch": "of W2 on validation images (D_val), by which the cell is chosen",
    "network": "of the network on its training images",
}
"""Problem → what its loss is of."""

GENERATED = ", plus its loss on generated ones"
"""What the loss of W2 has besides, if there is a generator."""


class PhaseProgress:
    """The progress of one phase: rounds, time left, losses, and the currently derived cell.

    Args:
        console: where it is shown; a quiet console shows nothing.
        name: of the phase.
        total: rounds of it.
        done: rounds that an earlier process made, if the run was resumed.
    """

    def __init__(self, console: Console, name: str, total: int, done: int = 0) -> None:
        self._console = console
        self._name, self._total = name, total
        # The rate is that of this process's rounds, not of those before it resumed.
        self._started, self._begun_at = time.monotonic(), done
        self._shown_at = -PLAIN_INTERVAL
        self._cells: Cells | None = None
        self._explained: set[str] = set()
        self._live: Live | None = None
        if console.is_terminal and not console.quiet:
            self._bar = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            self._task = self._bar.add_task(name, total=total, completed=done)
            self._live = Live(self._bar, console=console, refresh_per_second=4)

    def __enter__(self) -> PhaseProgress:
        if self._live is not None:
            self._live.start()
        elif not self._console.quiet and self._begun_at < self._total:
            self._print(f"{self._name}: {self._total - self._begun_at} rounds to come")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def update(
        self,
        done: int,
        losses: Mapping[str, Any],
        values: Mapping[str, float],
        cells: Callable[[], Cells] | None = None,
    ) -> None:
        """Shows that `done` rounds are complete.

        Args:
            done: rounds.
            losses: problem → its loss; of a game player → loss.
            values: other numbers, by name.
            cells: derives the current cell; called only when it is shown.
        """
        now = time.monotonic()
        interval = PLAIN_INTERVAL if self._live is None else LIVE_INTERVAL
        if self._console.quiet or (now - self._shown_at < interval and done < self._total):
            return  # the last round is always shown
        self._shown_at = now
        self._explain(losses)
        shown = [_described(name, value) for name, value in losses.items()]
        numbers = [f"{'loss' if len(losses) == 1 else 'losses'} {'  '.join(shown)}"]
        numbers += [_with_unit(name, value) for name, value in values.items()]
        found = cells() if cells is not None else None
        if self._live is not None:
            self._bar.update(self._task, completed=done)
            parts: list[RenderableType] = [self._bar, Text(";  ".join(numbers))]
            if found is not None:
                parts.append(_cell_table(found))
            self._live.update(Group(*parts))
            return

        # Without a terminal: one line, and the cells only if they have changed.
        rate = (now - self._started) / max(1, done - self._begun_at)
        left = " ".join(duration(rate * (self._total - done)))
        begins = f"{self._name} {done}/{self._total} rounds"
        self._print(";  ".join([begins, *numbers, f"{left} left"]))
        if found is not None and found != self._cells:
            self._cells = found
            for kind, nodes in found.to_data().items():
                described = "; ".join(", ".join(edge_names(edges, found)) for edges in nodes)
                self._print(f"  {kind} cell now: {described}")

    def _explain(self, losses: Mapping[str, Any]) -> None:
        """Says what the losses are of, each once."""
        new = [name for name in losses if name not in self._explained]
        self._explained.update(new)
        for name in new:
            if name in MEANINGS:
                more = GENERATED if name == "w2" and "gan" in self._explained else ""
                self._print(f"  {name}: the loss {MEANINGS[name]}{more}")

    def _print(self, line: str) -> None:
        say(self._console, line)


def _described(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        players = ", ".join(f"{player} {loss:.3f}" for player, loss in value.items())
        return f"{name} {players}"
    return f"{name} {value:.3f}"


def _with_unit(name: str, value: float) -> str:
    """A number with its unit, which its name may end with: error %."""
    is_share = name.endswith(" %")
    return f"{name.removesuffix(' %')} {value:.1f}%" if is_share else f"{name} {value:.3f}"


def _cell_table(genotype: Cells) -> Table:
    """The cells side by side, one row per node."""
    table = Table.grid(padding=(0, 3))
    data = genotype.to_data()
    table.add_row("", *(f"[bold]{kind} cell now" for kind in data))
    for node, cells in enumerate(zip(*data.values(), strict=True)):
        table.add_row(str(node), *(", ".join(edge_names(edges, genotype)) for edges in cells))
    return table
