"""Lines for people, printed as they are: not wrapped, not coloured, brackets without a meaning."""

from __future__ import annotations

from rich.console import Console

__all__ = ["say"]


def say(console: Console, text: str) -> None:
    """Prints a line as it is."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)
