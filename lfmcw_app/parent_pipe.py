"""Processes that end with the one that started them, however it ends.

A process that is killed by SIGKILL cannot tell its children. So each child holds the reading end of
a pipe, and the parent has the only writing end. When the parent ends, the system closes it, and the
child reacts as to SIGTERM.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
from collections.abc import Sequence
from typing import Any

__all__ = ["end_with_parent", "start_child"]

VARIABLE = "LFMCW_PARENT_PIPE"
"""Of the environment: the descriptor of the reading end, in the child."""


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
    """Sends this process SIGTERM when the parent has ended, if it was started by `start_child`."""
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
