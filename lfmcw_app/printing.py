"""Prints lines for people unchanged: not wrapped, not coloured, and with plain brackets.

Names of files and classes may hold anything. What would steer a terminal is not printed.
Tables are wrapped to the width of a terminal, without cutting a cell. They are not wrapped in a
file or a pipe, where others search and cut lines.
"""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

__all__ = ["print_table", "printable", "say"]

STEERS = [
    *range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A),
]  # fmt: skip
"""Control characters, and those that turn the direction of writing."""
PRINTED = {number: "\N{REPLACEMENT CHARACTER}" for number in STEERS if chr(number) not in "\t\n"}

WIDEST = 2**15
"""Columns of a table that no screen limits."""


def printable(text: str) -> str:
    """The text with U+FFFD in place of each character that would steer a terminal."""
    return text.translate(PRINTED)


def say(console: Console, text: str) -> None:
    """Prints a line as it is."""
    console.print(printable(text), highlight=False, soft_wrap=True, markup=False)


def print_table(console: Console, table: Table) -> None:
    """Prints a table, no cell cut; without a terminal each row is one line, whatever its length."""
    for column in table.columns:
        column.overflow = "fold"
    if console.is_terminal:
        console.print(table)
        return
    width = console.width
    console.width = WIDEST
    try:
        console.print(table)
    finally:
        console.width = width
