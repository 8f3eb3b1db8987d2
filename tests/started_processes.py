"""Processes that tests start: each wait is for an event, and nothing outlives its test.

No test depends on how fast a machine is. What is waited for is an event (a file, a line, the end of
a process), and one bound, far above what the slowest machine needs, ends a test that would hang.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
import uuid
from contextlib import contextmanager
from pathlib import Path

PATIENCE = 900.0
"""Seconds after which something counts as hanging, however busy the machine is."""

INTERVAL = 0.01
"""Seconds between two looks at what is waited for."""

MARK = "STARTED_BY_TEST"
"""Variable of the environment by which the descendants of a process are found."""


def wait_for(event, *processes):
    """Waits until `event()` is true; none of the processes may end before it is.

    Raises:
        AssertionError: if one has ended, with what it said, or at the end of patience.
    """
    end = time.monotonic() + PATIENCE
    while not event():
        for process in processes:
            if process.poll() is not None and not event():
                said = [stream.read() for stream in (process.stdout, process.stderr) if stream]
                raise AssertionError(f"ended with {process.returncode}: {said}")
        assert time.monotonic() < end, "nothing has happened"
        time.sleep(INTERVAL)


def has_lines(path, count):
    """An event: the file has so many lines."""
    return lambda: path.exists() and path.read_bytes().count(b"\n") >= count


@contextmanager
def started(command, *, env=None, **options):
    """A running process; at the end it is killed, with all that it started."""
    mark = uuid.uuid4().hex
    environment = {**(os.environ if env is None else env), MARK: mark}
    with subprocess.Popen(list(map(str, command)), env=environment, **options) as process:
        try:
            yield process
        finally:
            process.kill()
            kill_descendants(mark)


def finished(command, **options):
    """What a command printed, and its exit code, like `subprocess.run`."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
    with started(command, **options) as process:
        printed, errors = process.communicate(timeout=PATIENCE)
    return subprocess.CompletedProcess(command, process.returncode, printed, errors)


def kill_descendants(mark):
    """Kills what has the mark in its environment, also in a session of its own.

    Where there is no /proc, only the process itself is killed, by `started`.
    """
    entry = f"{MARK}={mark}".encode()
    # A process that is being started has no environment for a moment: it is looked at again.
    starting = True
    while starting:
        starting = False
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                environment = path.read_bytes()
                if entry in environment.split(b"\0"):
                    kill(int(path.parent.name))
                elif not environment:
                    status = (path.parent / "status").read_text()
                    starting |= "VmSize:" in status and "\nState:\tZ" not in status
            except OSError:  # it has ended, or is another user's
                continue


def kill(pid):
    """Kills a process that may have ended."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
