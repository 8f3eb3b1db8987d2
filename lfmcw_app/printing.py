"""Prints lines for people unchanged: not wrapped, not coloured, and with plain brackets."""

from __future__ import annotations

from rich.console import Console

__all__ = ["say"]


def say(console: Console, text: str) -> None:
    """Prints a line as it is."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)
