"""Starts a script in several processes, as the tests of data parallelism need it."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import ExitStack

import data_parallel_cases
from started_processes import PATIENCE, started

import mlo

OUTPUT = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}


def launch(size, folder, script=data_parallel_cases.__file__, arguments=None, expect=0):
    """Runs `size` processes of a script to their ends; returns what each printed."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [os.path.dirname(os.path.dirname(mlo.__file__)), *sys.path]
    )
    with ExitStack() as stack:
        running = []
        for rank in range(size):
            given = arguments or [folder / "store", rank, size, folder]
            own = {**environment, "RANK": str(rank), "WORLD_SIZE": str(size)}
            command = [sys.executable, script, *given]
            running.append(stack.enter_context(started(command, env=own, **OUTPUT)))
        printed = [process.communicate(timeout=PATIENCE)[0] for process in running]
    codes = [process.returncode for process in running]
    assert all((code == 0) == (expect == 0) for code in codes), "\n".join(
        [f"exit codes {codes}", *printed]
    )
    return printed
