"""Starts a script in several processes, as the tests of data parallelism need it."""

from __future__ import annotations

import os
import subprocess
import sys

import data_parallel_cases

import mlo

TIMEOUT = 300
"""Seconds after which processes count as hanging."""


def launch(size, folder, script=data_parallel_cases.__file__, arguments=None, expect=0):
    """Runs `size` processes of a script to their ends; returns what each printed."""
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(
        [os.path.dirname(os.path.dirname(mlo.__file__)), *sys.path]
    )
    running = [
        subprocess.Popen(
            [
                sys.executable,
                script,
                *(arguments or [str(folder / "store"), str(rank), str(size), str(folder)]),
            ],
            env={**environment, "RANK": str(rank), "WORLD_SIZE": str(size)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        printed = [process.communicate(timeout=TIMEOUT)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    codes = [process.returncode for process in running]
    assert all((code == 0) == (expect == 0) for code in codes), "\n".join(
        [f"exit codes {codes}", *printed]
    )
    return printed
