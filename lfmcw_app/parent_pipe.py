"""Processes that end with the one that started them, however that ends.

A process that is killed by SIGKILL cannot tell its children. So each child holds the reading end of
a pipe, and the parent has the only writing end. When the parent ends, the system closes it, and the
child reacts as to SIGTERM.

`torchrun` holds no such pipe. Its processes check every second whether they still have the same
parent.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

__all__ = ["end_with_parent", "start_child"]

VARIABLE = "LFMCW_PARENT_PIPE"
"""Variable of the environment: the descriptor of the reading end, in the child."""

LAUNCHED = "TORCHELASTIC_RUN_ID"
"""Variable of the environment, in the processes that `torchrun` starts."""

LOOK = 1.0
"""Seconds between two looks at the parent."""


def start_child(command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
    """Starts a process that calls `end_with_parent` to learn when this one ends.

    Args:
        command: the program and its arguments.
        options: of `subprocess.Popen`.
    """
    reader, writer = os.pipe()
    try:
        process = subprocess.Popen(
            list(command),
            pass_fds=(reader,),
            env={**os.environ, VARIABLE: str(reader)},
            **options,
        )
    except BaseException:
        os.close(writer)
        raise
    finally:
        os.close(reader)
    process.parent_pipe = _Writer(writer)  # type: ignore[attr-defined]
    return process


class _Writer:
    """The writing end of a pipe, closed with the process object that holds it."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __del__(self) -> None:
        os.close(self._descriptor)


def end_with_parent() -> None:
    """Sends this process SIGTERM when the parent has ended.

    The parent must have used `start_child`, or be `torchrun`; otherwise nothing is done.
    """
    if LAUNCHED in os.environ:
        _end_with_launcher()
    # Removed, so that processes started by this one do not watch the wrong parent.
    descriptor = os.environ.pop(VARIABLE, None)
    if descriptor is None:
        return
    reader = int(descriptor)
    os.set_inheritable(reader, False)

    def watch() -> None:
        while os.read(reader, 1):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="parent pipe", daemon=True).start()


def _end_with_launcher() -> None:
    """Lets a process of `torchrun` end with it: it would hold the run folder, and its GPU."""
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(LOOK)
        with contextlib.suppress(OSError):  # the reader of a pipe may have ended with it
            print("torchrun has ended, so this process ends too.", file=sys.stderr, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="launcher", daemon=True).start()
