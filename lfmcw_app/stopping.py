"""SIGTERM and SIGINT end a run after its round and a checkpoint; a long round is abandoned."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["GRACE", "Stopped", "requested", "settled", "stop_signals"]

GRACE = 8.0
"""Seconds that a round may take after SIGTERM; schedulers kill after 10 to 30."""

_received: int | None = None
_settled = threading.Event()


class Stopped(Exception):
    """A run has stopped because of a signal, and its state is saved.

    Attributes:
        signal: which.
        exit_code: 0 for SIGTERM, which asks for just this; 130 for SIGINT, as shells expect.
    """

    def __init__(self, received: int) -> None:
        super().__init__(f"stopped by {signal.Signals(received).name}")
        self.signal = received
        self.exit_code = 0 if received == signal.SIGTERM else 128 + received


def requested() -> int | None:
    """The signal that asks this process to stop at the end of its round; None if there was none."""
    return _received


def settled() -> None:
    """Says that the round has ended: the process is writing or about to end, so it may finish."""
    _settled.set()


@contextmanager
def stop_signals(advice: str = "") -> Iterator[None]:
    """While the body runs, the first SIGTERM or SIGINT only asks it to stop (see `requested`).

    A second SIGINT raises KeyboardInterrupt. If the round has not ended `GRACE` seconds after a
    SIGTERM, the process exits with code 0 in the middle of it: a checkpoint is whole at every
    moment, so nothing is lost but the rounds since the last one.

    A Python signal handler runs only between two instructions of the interpreter, and one of them
    can be a backward pass that takes minutes. So a thread waits for the signal, which the system
    writes into a pipe.

    Args:
        advice: what to do next, said where a round is given up.
    """
    global _received
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return

    # The system writes the numbers of signals into the pipe, from whatever it interrupts: the
    # writer must not block.
    _received = None
    _settled.clear()
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before = {number: signal.signal(number, _ask) for number in (signal.SIGTERM, signal.SIGINT)}
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
    global _received
    if number == signal.SIGINT and _received is not None:
        raise KeyboardInterrupt
    if _received is None:
        _received = number
        if number == signal.SIGINT:
            print(
                "Stopping at the end of this round; Ctrl-C again stops at once.",
                file=sys.stderr,
                flush=True,
            )


def _watch(reader: int, advice: str) -> None:
    while received := os.read(reader, 64):
        if signal.SIGTERM in received and not _settled.wait(GRACE):
            print(
                f"SIGTERM: the round did not end within {GRACE:.0f} s, so it is given up; the last "
                f"checkpoint stands. {advice}",
                file=sys.stderr,
                flush=True,
            )
            os._exit(0)
