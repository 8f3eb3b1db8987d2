"""Reads published pickles with an unpickler that makes only plain values and what a list names.

A pickle names the classes and functions that are called to rebuild its content, so opening one can
run anything. Here every name is looked up in a list that the reader of a format gives, and nothing
is imported by name. A file cannot change anything that outlives it either, because it may set the
state only of objects of the types that the reader gives. Bytes, operations and nested tuples are
bounded, so a small file cannot take all memory or end the program.

The unpickler is the standard library's Python version. The C version makes room for any memo index
that a file names, and its operations cannot be checked.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol

__all__ = ["Known", "Limits", "PickleError", "unpickled"]

Known = Mapping[tuple[str, str], Any]
"""(module, name) that a pickle may name → what it stands for."""

OPERATIONS = (
    b"\x80\x95(."  # protocol, frame, mark, stop
    b"NI\x88\x89JKML\x8a\x8bFG"  # None, numbers
    b"STUVX\x8c\x8dBC\x8e"  # texts and bytes
    b"]aeld}us\x8f\x90)t\x85\x86\x87"  # lists, dictionaries, sets, tuples
    b"pqrghj\x94"  # the memo
    b"c\x93Rb"  # names, calls, states
)
"""The operations that a file may use: plain values, calls of known names, and states."""

STATE = ord("b")
TUPLES = b"t\x85\x86\x87"
LONGEST_TUPLE = 16
"""Largest number of items in a tuple. Tuples can be keys, and hashing one visits everything in it,
in C. Published files have up to 9 items, and tuples in tuples, but no deeper ones.
"""


class PickleError(ValueError):
    """A pickle is damaged, or names something forbidden; the message says which, in a few words."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits that the largest published file of a kind does not reach.

    Attributes:
        content: bytes of the pickle.
        operations: of the pickle; each makes one object at most, of which the largest without
            content has 216 bytes.
    """

    content: int
    operations: int


class Stream(Protocol):
    """A stream that a pickle is read from."""

    def read(self, size: int, /) -> bytes:
        """So many bytes, or fewer at the end."""
        ...

    def readline(self, size: int, /) -> bytes:
        """The bytes of a line, but at most so many."""
        ...


class _Bounded:
    """A stream that gives the requested bytes, up to a limit, or refuses."""

    def __init__(self, stream: Stream, limit: int) -> None:
        self._stream, self._left = stream, limit

    def read(self, size: int) -> bytes:
        self._take(size)
        content = self._stream.read(size)
        if len(content) < size:
            raise PickleError("it ends too early")
        return content

    def readline(self) -> bytes:
        content = self._stream.readline(self._left + 1)
        self._take(len(content))
        if not content.endswith(b"\n"):
            raise PickleError("it ends too early")
        return content

    def _take(self, size: int) -> None:
        if size > self._left:
            raise PickleError("it is larger than any published file")
        self._left -= size


class _Unpickler(pickle._Unpickler):
    """Makes numbers, texts, lists, sets and dictionaries, and what `known` names."""

    stack: list[Any]

    def __init__(
        self,
        stream: _Bounded,
        known: Known,
        states: tuple[type[Any], ...],
        most: int,
        encoding: str,
    ) -> None:
        super().__init__(stream, encoding=encoding)
        self._known, self._states = known, states
        table: dict[int, Any] = {code: self.dispatch[code] for code in OPERATIONS}
        table |= {code: _checked_tuple(table[code]) for code in TUPLES}
        table[STATE] = _Unpickler._set_state
        self.dispatch = _Counted(table, most)  # type: ignore[misc]  # of this file alone

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self._known:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return self._known[module, name]

    def _set_state(self) -> None:
        state = self.stack.pop()
        changed = self.stack[-1]
        if not isinstance(changed, self._states):
            raise PickleError("it sets the state of an object that has none")
        changed.__setstate__(state)


class _Counted(dict[int, Callable[[Any], None]]):
    """Maps operations to what performs them, and counts the requested ones."""

    def __init__(self, table: Mapping[int, Callable[[Any], None]], most: int) -> None:
        super().__init__(table)
        self._left = most

    def __getitem__(self, code: int) -> Callable[[Any], None]:
        self._left -= 1
        if self._left < 0:
            raise PickleError("it has more operations than any published file")
        return self.get(code) or _refuse(code)


def _refuse(code: int) -> NoReturn:
    raise PickleError(f"it has the operation {bytes([code])!r}, which plain values do not need")


def _checked_tuple(make: Callable[[Any], None]) -> Callable[[Any], None]:
    """Makes a tuple, and refuses one that takes long to hash."""

    def made(unpickler: Any) -> None:
        make(unpickler)
        whole = unpickler.stack[-1]
        inner = [item for item in whole if type(item) is tuple]
        if len(whole) > LONGEST_TUPLE or any(tuple in map(type, item) for item in inner):
            raise PickleError("its tuples are longer or deeper than those of published files")

    return made


def unpickled(
    stream: Stream,
    known: Known,
    *,
    limits: Limits,
    states: tuple[type[Any], ...] = (),
    encoding: str = "ASCII",
) -> Any:
    """Returns the content of a pickle.

    Args:
        stream: the pickle.
        known: all names that it may use.
        limits: of its size.
        states: types of objects whose state it may set, by their `__setstate__`.
        encoding: of Python 2's strings; "bytes" leaves them byte strings.

    Raises:
        PickleError: if it is damaged, beyond the limits, or uses another name or operation.
    """
    try:
        bounded = _Bounded(stream, limits.content)
        return _Unpickler(bounded, known, states, limits.operations, encoding).load()
    except (
        pickle.UnpicklingError, OSError, EOFError, ImportError, LookupError, AttributeError,
        TypeError, ValueError, ArithmeticError, MemoryError, RecursionError,
    ) as error:  # fmt: skip
        raise PickleError(str(error) or type(error).__name__) from None
