"""Ctrl-C before a run has begun, or in a command without a run: one line, and exit code 130.

It imports neither torch nor Typer, so that it can answer while these are imported, which takes
seconds. While a run makes its rounds, stopping.py answers instead.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["answered_interrupts"]

INTERRUPTED = 130
"""Exit code of a program that SIGINT ends, as shells expect it."""

_struck = False


def _strike(number: int, frame: FrameType | None) -> None:
    global _struck
    _struck = True
    raise KeyboardInterrupt


@contextmanager
def answered_interrupts() -> Iterator[None]:
    """Says what an interrupt of the body has left, and ends the process.

    It may strike in an import or a library, which turns it into another error. A process that
    ignores SIGINT, as in the background of a shell, still ignores it.

    Raises:
        SystemExit: with code 130, if the body was interrupted.
    """
    global _struck
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield  # an outer body answers, or nobody
        return
    _struck = False
    signal.signal(signal.SIGINT, _strike)
    try:
        yield
    except BaseException as error:
        ended = isinstance(error, SystemExit) and error.code != INTERRUPTED
        if ended or not _struck:
            raise
        if os.environ.get("RANK", "0") == "0":  # of several processes one speaks
            print(_left(), file=sys.stderr, flush=True)
        raise SystemExit(INTERRUPTED) from None
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _left() -> str:
    """What an interrupt has left. Without the module that completes files, none is complete."""
    files = sys.modules.get("lfmcw_app.output_files")
    if files is not None and files.completed():
        return "Interrupted; the files that were complete are kept."
    return "Interrupted; nothing was saved."
