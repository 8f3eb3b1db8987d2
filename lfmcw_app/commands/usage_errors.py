"""The messages for wrong options, values and arguments of a command line."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

import typer

__all__ = ["UsageError", "clarify"]

# Typer has its own class of this name or that of click, depending on its version.
UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""What Typer raises for a command line that it cannot read; shown under the usage."""

ALIKE = 0.75
"""Least similarity of an option's name to be the one that was meant."""

IN_WORDS = (
    (r"Input should be a valid integer.*", "it must be a whole number"),
    (r"Input should be a valid number.*", "it must be a number"),
    (r"Input should be greater than or equal to (\S+)", r"it must be at least \1"),
    (r"Input should be less than or equal to (\S+)", r"it must be at most \1"),
)
"""Beginning of a message → what to say instead; it does not say what was received."""


def clarify(error: Any, params: Sequence[Any], args: Sequence[str]) -> None:
    """Rewrites an error's message: what is wrong, what was received, what to do.

    Args:
        error: a `UsageError`.
        params: of the command.
        args: what was given to it.
    """
    if hasattr(error, "possibilities") and hasattr(error, "option_name"):
        _name_the_nearest(error, params)
        return
    param = getattr(error, "param", None)
    if isinstance(error, typer.BadParameter) and param is not None:
        if not error.message:  # it is missing
            error.message = param.help or ""
            return
        for pattern, words in IN_WORDS:
            if re.match(pattern, error.message):
                got = _value_of(param, args)
                error.message = re.sub(pattern, words, error.message) + f", got {got!r}."
                return
    elif (name := getattr(error, "option_name", None)) and "requires" in error.message:
        told = next((known.help for known in params if name in known.opts), None)
        error.message = f"Option {name} needs a value after it. {told or ''}".strip()
    elif error.message.startswith("Got unexpected extra argument"):
        error.message += (
            ". The value of an option needs the option's name before it, as --preset small. A "
            "path with blanks needs quotes."
        )


def _name_the_nearest(error: Any, params: Sequence[Any]) -> None:
    """Names the one option that is most like an unknown one, if any is."""
    known = [name for param in params if hasattr(param, "is_flag") for name in param.opts]
    given = error.option_name.lower().replace("_", "-")
    near = difflib.get_close_matches(given, known, n=1, cutoff=ALIKE)
    error.message = f"There is no option {error.option_name}."
    if near:
        error.message += f" Did you mean {near[0]}?"
    elif "--set" in known:
        error.message += " A setting of the recipe is given as --set KEY=VALUE."
    error.possibilities = None


def _value_of(param: Any, args: Sequence[str]) -> str:
    """What was given to an option."""
    for place in reversed(range(len(args))):
        name, equals, value = args[place].partition("=")
        if name in param.opts:
            return value if equals else args[place + 1]
    return ""
