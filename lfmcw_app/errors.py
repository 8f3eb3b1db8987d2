"""Errors of the application that a user can mend: shown as one paragraph, with exit code 2."""

from __future__ import annotations

__all__ = ["InputError", "NumbersWarning"]


class InputError(ValueError):
    """What the user gave cannot be used; the message says what, what was received, and what to do."""


class NumbersWarning(UserWarning):
    """Numbers of a run are lost, or no longer mean what they should; what is done about it is said."""
