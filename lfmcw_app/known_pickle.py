"""Reads published pickles: an unpickler that makes plain values and what a list names, no more.

A pickle says by name which classes and functions are called to make what it holds, so that opening
one can run anything. Here every name is looked up in a list that the reader of a format gives, and
nothing is imported by its name.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from typing import Any, Protocol

__all__ = ["Known", "PickleError", "unpickled"]

Known = Mapping[tuple[str, str], Any]
"""(module, name) that a pickle may name → what it stands for."""


class PickleError(ValueError):
    """A pickle is damaged, or names what it may not; the message says which, in a few words."""


class Stream(Protocol):
    """What a pickle is read from."""

    def read(self, size: int, /) -> bytes:
        """So many bytes, or fewer at the end."""
        ...

    def readline(self) -> bytes:
        """The bytes of a line."""
        ...


class _Unpickler(pickle.Unpickler):
    """Makes numbers, texts, lists, sets and dictionaries, and what `known` names."""

    def __init__(self, stream: Stream, known: Known, encoding: str) -> None:
        super().__init__(stream, encoding=encoding)
        self._known = known

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return self._known[module, name]


def unpickled(stream: Stream, known: Known, *, encoding: str = "ASCII") -> Any:
    """What a pickle holds.

    Args:
        stream: the pickle.
        known: all names that it may use.
        encoding: of Python 2's strings; "bytes" leaves them byte strings.

    Raises:
        PickleError: if it is damaged, or uses another name.
    """
    try:
        return _Unpickler(stream, known, encoding).load()
    except (
        pickle.UnpicklingError, OSError, EOFError, ImportError, LookupError, AttributeError,
        TypeError, ValueError, ArithmeticError, MemoryError, RecursionError,
    ) as error:  # fmt: skip
        raise PickleError(str(error) or type(error).__name__) from None
