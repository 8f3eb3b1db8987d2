"""An iterator over rounds or updates that warns if none is requested."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import SupportsIndex, TypeVar

from mlo.errors import ConfigurationError, warn_user

__all__ = ["LazyRounds", "check_count"]

T = TypeVar("T")


def check_count(call: str, argument: str, value: object) -> None:
    """Refuses a number of rounds that is no whole number, such as a fraction of a round.

    Args:
        call: what was called.
        argument: its argument.
        value: what it was given; numpy's integers will do.

    Raises:
        ConfigurationError: naming all three.
    """
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise ConfigurationError(
            f"{call}({argument}={value!r}): the number of rounds must be an integer."
        )


class LazyRounds(Iterator[T]):
    """Makes each element only when it is requested.

    Args:
        elements: what it yields.
        call: what was called, for the warning: `run(steps=10)`.
    """

    def __init__(self, elements: Iterator[T], call: str) -> None:
        self._elements, self._call = elements, call
        self._asked = False

    def __next__(self) -> T:
        self._asked = True
        return next(self._elements)

    def __del__(self) -> None:
        # A call of `run` as a statement drops it at once. This warning is its only trace.
        if not self._asked and not sys.is_finalizing():
            warn_user(
                f"{self._call} made nothing: it yields a record after each round (or update), and "
                "makes a round only when its record is requested. Iterate over it: `for record "
                "in optimizer.run(steps): ...`, or `list(optimizer.run(steps))`."
            )
