"""Keeps the data set that was read last for later runs in the same process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache

from lfmcw_app.data import Dataset, load_dataset

__all__ = ["keeping_data", "reader"]

_reader: ContextVar[Callable[..., Dataset]] = ContextVar("reader", default=load_dataset)


def reader() -> Callable[..., Dataset]:
    """`load_dataset`, or its replacement within `keeping_data`."""
    return _reader.get()


@contextmanager
def keeping_data() -> Iterator[None]:
    """While the body runs, a data set is read once, until another one is requested.

    Nobody changes a data set after it is read, so runs that share it do not affect one another.
    Files that change meanwhile are not read again.
    """
    token = _reader.set(lru_cache(maxsize=1)(load_dataset))
    try:
        yield
    finally:
        _reader.reset(token)
