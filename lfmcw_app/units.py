"""Times, sizes and widths of texts, for people."""

from __future__ import annotations

import unicodedata

__all__ = ["duration", "size", "text_units"]


YEAR = 365.25 * 86400


def duration(seconds: float) -> tuple[str, str]:
    """A time as a number and the unit that suits it."""
    for unit, length in (("years", YEAR), ("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f}", unit
    return f"{seconds:.1f}" if seconds < 20 else f"{seconds:.0f}", "s"


def size(count: int) -> tuple[str, str]:
    """A number of bytes as a number and the unit that suits it."""
    for unit, length in (("GB", 1e9), ("MB", 1e6)):
        if count >= length:
            return f"{count / length:.3g}", unit
    return f"{count / 1e3:.3g}", "kB"


def text_units(text: str) -> int:
    """The width of a text in letters; those of Chinese, Japanese and Korean count twice."""
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)
