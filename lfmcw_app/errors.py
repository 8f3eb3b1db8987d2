"""Errors of the application that a user can fix: shown as one paragraph, with exit code 2."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

__all__ = ["DataWarning", "HeldError", "InputError", "NumbersWarning", "listed", "shown"]

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 80
_SHORT.maxlevel = 3


class InputError(ValueError):
    """The user's input cannot be used; the message says why and what to do instead.

    Attributes:
        exit_code: of a program that ends with it.
    """

    exit_code = 2


class HeldError(InputError):
    """Another process holds a run folder; the same command works once the folder is released."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h


class NumbersWarning(UserWarning):
    """Numbers of a run are lost or unreliable; the message says what happens next."""


def shown(value: Any) -> str:
    """Shows what was received, for a message: any value, at bounded length."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # an integer of more digits than Python prints
        return f"a {type(value).__name__} too long to print"


class DataWarning(UserWarning):
    """The data do not suffice for everything that a run does; the message says for what."""


def listed(items: Sequence[str], *, most: int = 4) -> str:
    """The first few items, separated by commas, and how many more there are."""
    more = len(items) - most
    return ", ".join(items[:most]) + (f" and {more:,} more" if more > 0 else "")
