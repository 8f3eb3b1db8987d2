"""Signals end a run after its round and a checkpoint; a round that takes long is abandoned."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

__all__ = [
    "ENDS",
    "GRACE",
    "Stopped",
    "interrupted_at_once",
    "record_saved",
    "requested",
    "saved",
    "settled",
    "stop_signals",
    "unwound",
]

GRACE = 8.0
"""Seconds that a round may take after SIGTERM; schedulers kill after 10 to 30."""

ENDS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
"""What systems send before they kill, and what a terminal sends that is closed."""

_received: int | None = None
_at_once = False
_saved = "its beginning"
_settled = threading.Event()


class Stopped(Exception):
    """A run has stopped because of a signal, with its state saved.

    Attributes:
        signal: which.
        exit_code: 0 for SIGTERM, which requests exactly this; otherwise as shells expect: 130 for
            SIGINT, 129 for SIGHUP.
    """

    def __init__(self, received: int) -> None:
        super().__init__(f"stopped by {signal.Signals(received).name}")
        self.signal = received
        self.exit_code = _exit_code(received)


def _exit_code(received: int) -> int:
    return 0 if received == signal.SIGTERM else 128 + received


def requested() -> int | None:
    """The signal that asked this process to stop at the end of its round; None without one."""
    return _received


def interrupted_at_once() -> bool:
    """Whether the last body of `stop_signals` had a second SIGINT.

    The KeyboardInterrupt may have struck in the middle of an import, or in a library that turned it
    into another error.
    """
    return _at_once


def record_saved(where: str) -> None:
    """Records where a run resumes from, as "round 12 of 15 of search"."""
    global _saved
    _saved = where


def saved() -> str:
    """What of a run is saved, after "up to": where it resumes from."""
    return _saved


def settled() -> None:
    """Records that the round has ended: the process is writing or ending, so it may finish."""
    _settled.set()


@contextmanager
def unwound() -> Iterator[None]:
    """Ends the body at SIGTERM or SIGHUP as an error would, so that it removes what it has begun.

    A signal that is ignored, or answered otherwise, stays so.

    Raises:
        SystemExit: with the exit code that shells give such an end.
    """
    main = threading.current_thread() is threading.main_thread()
    usual = [end for end in ENDS if main and signal.getsignal(end) == signal.SIG_DFL]
    for end in usual:
        signal.signal(end, _unwind)
    try:
        yield
    finally:
        for end in usual:
            signal.signal(end, signal.SIG_DFL)


def _unwind(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


@contextmanager
def stop_signals(advice: str = "", *, begun: bool = False) -> Iterator[None]:
    """While the body runs, the first SIGTERM, SIGHUP or SIGINT only asks it to stop.

    See `requested`. A second SIGINT raises KeyboardInterrupt. If the round has not ended `GRACE`
    seconds after a SIGTERM or SIGHUP, the process exits in the middle of it. There is a complete
    checkpoint at every moment, so only the rounds since then are lost. SIGHUP stays ignored where
    it was, as under nohup.

    A Python signal handler runs only between two instructions of the interpreter, and one
    instruction can be a backward pass of minutes. So a thread waits for the signal, which the
    system writes into a pipe.

    Args:
        advice: what to do next, printed if a round is given up.
        begun: whether the run has a checkpoint already, which takes a while to load.
    """
    global _received, _at_once, _saved
    _saved = "its last checkpoint" if begun else "its beginning"
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread handles signals
        return

    # The system writes the numbers of signals into the pipe, whatever it interrupts, so the writer
    # must not block.
    _received, _at_once = None, False
    _settled.clear()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    handled = [end for end in ENDS if signal.getsignal(end) != signal.SIG_IGN]
    before = {number: signal.signal(number, _ask) for number in (*handled, signal.SIGINT)}
    watcher = threading.Thread(target=_watch, args=(reader, advice), daemon=True)
    watcher.start()
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(wakeup)
        _settled.set()
        _received = None
        os.close(writer)  # ends the watcher
        watcher.join()
        os.close(reader)


def _ask(number: int, frame: FrameType | None) -> None:
    global _received, _at_once
    if number == signal.SIGINT and _received is not None:
        _at_once = True
        raise KeyboardInterrupt
    if _received is None:
        _received = number
        if number == signal.SIGINT:
            print(
                "Stopping at the end of this round. Press Ctrl-C again to stop at once.",
                file=sys.stderr,
                flush=True,
            )


def _watch(reader: int, advice: str) -> None:
    while received := os.read(reader, 64):
        found = [number for number in ENDS if number in received]
        if found and not _settled.wait(GRACE):
            print(
                f"{signal.Signals(found[0]).name}: the round did not end within {GRACE:.0f} s, so "
                f"it is given up. The last checkpoint is kept: the run resumes from {saved()}. "
                f"{advice}",
                file=sys.stderr,
                flush=True,
            )
            os._exit(_exit_code(found[0]))
