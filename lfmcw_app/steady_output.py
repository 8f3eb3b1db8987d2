"""Standard output and errors that outlive their readers: no run ends with its output.

`| head`, a terminal that closes and a full disk end what is printed, not what is computed. What the
encoding of a terminal or a pipe lacks is printed as an escape.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from lfmcw_app.errors import InputError

__all__ = ["steady_output"]

READER_GONE = (errno.EPIPE, errno.EIO)
"""Nobody reads any more: `| head` has what it wants, or a terminal was closed."""


class _Steady:
    """A stream whose failures to write end it, and nothing else.

    Args:
        stream: what is written to.

    Attributes:
        failure: the first one; None without.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.failure: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Writes a text, or drops it."""
        try:
            return self._stream.write(text)
        except OSError as error:
            self._end(error)
            return len(text)

    def flush(self) -> None:
        """Writes what waits, or drops it."""
        try:
            self._stream.flush()
        except OSError as error:
            self._end(error)

    def _end(self, error: OSError) -> None:
        self.failure = self.failure or error
        # What the stream still holds must go somewhere, or the interpreter fails at its end.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)


@contextmanager
def steady_output() -> Iterator[None]:
    """Keeps failures to print from ending the body.

    If output is missing at the end though it had a reader (a full disk), a message says so.

    Raises:
        SystemExit: with code 2, if the body ended well and output is missing.
    """
    before = sys.stdout, sys.stderr
    output, errors = map(_steady, before)
    sys.stdout, sys.stderr = output, errors
    code: Any = None
    try:
        yield
    except SystemExit as end:
        code = end.code
    finally:
        if output is not None:
            output.flush()  # what waits may fail too
        sys.stdout, sys.stderr = before
    failure = output.failure if isinstance(output, _Steady) else None
    if failure is not None and failure.errno not in READER_GONE:
        print(
            f"Error: What was printed is incomplete ({failure.strerror}). All files are complete.",
            file=errors,
        )
        code = code or InputError.exit_code
    if code is not None:
        raise SystemExit(code)


def _steady(stream: Any) -> Any:
    """The stream so that it outlives its reader; a process may have none."""
    if stream is None:
        return None
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="backslashreplace")
    return _Steady(stream)
