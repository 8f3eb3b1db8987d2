"""The data set that was read last, kept for the runs that follow in the same process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

from lfmcw_app.data import Dataset, load_dataset

__all__ = ["keeping_data", "reader"]

_reader: ContextVar[Callable[..., Dataset]] = ContextVar("reader", default=load_dataset)


def reader() -> Callable[..., Dataset]:
    """`load_dataset`, or what stands for it within `keeping_data`."""
    return _reader.get()


@contextmanager
def keeping_data() -> Iterator[None]:
    """While the body runs, a data set is read once for as long as no other is asked for.

    Nobody changes a data set that was read, so that the runs which share it do not see one another.
    Files that change meanwhile are not read again.
    """
    token = _reader.set(lru_cache(maxsize=1)(load_dataset))
    try:
        yield
    finally:
        _reader.reset(token)
