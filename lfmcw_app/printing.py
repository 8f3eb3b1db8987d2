"""Prints lines for people unchanged: not wrapped, not coloured, and with plain brackets.

Tables are wrapped to the width of a terminal, but never in a file or a pipe, where others search
and cut lines.
"""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

__all__ = ["print_table", "say"]

WIDEST = 2**15
"""Columns of a table that no screen limits."""


def say(console: Console, text: str) -> None:
    """Prints a line as it is."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)


def print_table(console: Console, table: Table) -> None:
    """Prints a table; without a terminal each row stays on one line, whatever its length."""
    if console.is_terminal:
        console.print(table)
        return
    width = console.width
    console.width = WIDEST
    try:
        console.print(table)
    finally:
        console.width = width
