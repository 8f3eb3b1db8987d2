"""Prepares the next values of a function of an index in threads, while the current one is used."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

__all__ = ["DEPTH", "Prefetcher"]

Value = TypeVar("Value")

DEPTH = 2
"""How many values are prepared ahead. Two keep up with work of varying duration; more take memory.
"""


class Prefetcher(Generic[Value]):
    """Values of a function; those of the next indices are prepared ahead.

    A value depends on its index alone. Preparing ahead changes when a value is ready, but never the
    value. So any index may follow any other (a rollback, a resumed run), and readers at different
    places share what they both need.

    A thread lives only while it prepares something, so none is left when readers stop, for whatever
    reason. An error is raised to the reader that requests the index, not earlier.

    The prefetcher holds the value that a reader was given last, the one before it, and `depth`
    after it.

    Args:
        make: the function. It is called in threads, several at a time.
        depth: how many values are prepared ahead; with 0 each is made when it is requested, and not
            held.
        end: the first index that has no value; None for a function without an end.
    """

    def __init__(
        self, make: Callable[[int], Value], *, depth: int = DEPTH, end: int | None = None
    ) -> None:
        self._make, self._depth, self._end = make, depth, end
        self._places: dict[Hashable, int] = {}  # reader → the index that it requested last
        self._prepared: dict[int, Future[Value]] = {}

    def get(self, index: int, reader: Hashable = None) -> Value:
        """Returns the value of an index, and starts to prepare those after it.

        Args:
            index: at least 0.
            reader: the caller. All readers call from one thread.

        Raises:
            BaseException: what the function raised for this index.
        """
        if self._depth == 0:
            return self._make(index)
        self._places[reader] = index
        self._forget()
        last = index + self._depth if self._end is None else min(index + self._depth, self._end - 1)
        missing = [k for k in range(index, last + 1) if k not in self._prepared]
        if missing:
            # The executor is told at once that nothing follows, so its thread ends with its work.
            with_one_thread = ThreadPoolExecutor(1, "prefetch")
            for k in missing:
                self._prepared[k] = with_one_thread.submit(self._make, k)
            with_one_thread.shutdown(wait=False)
        try:
            return self._prepared[index].result()
        except BaseException:
            self._prepared.pop(index)  # the next request tries again
            raise

    def _forget(self) -> None:
        """Drops values that are near no reader, and cancels those that have not begun."""
        near = {
            k for place in self._places.values() for k in range(place - 1, place + self._depth + 1)
        }
        for k in self._prepared.keys() - near:
            self._prepared.pop(k).cancel()
