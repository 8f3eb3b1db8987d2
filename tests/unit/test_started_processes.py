"""Processes of tests end with them, with all that they started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from started_processes import finished, has_lines, started, wait_for

PARENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(3600)"],
                         start_new_session=True)
print(child.pid, flush=True)
{then}
"""


def running(pid):
    """Whether a process is there, and more than a name that nobody has waited for."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="needs /proc")
@pytest.mark.parametrize("then", ["time.sleep(3600)", ""], ids=["is killed", "has ended"])
def test_nothing_outlives_a_started_process(then):
    """A child in a session of its own is ended too, also where its parent has left it."""
    command = [sys.executable, "-S", "-c", PARENT.format(then=then)]
    with started(command, stdout=subprocess.PIPE, text=True) as process:
        pid = int(process.stdout.readline())
        assert running(pid)
    wait_for(lambda: not running(pid))
    assert process.returncode in (0, -9)


def test_a_failing_test_leaves_no_process():
    command = [sys.executable, "-S", "-c", "import time; time.sleep(3600)"]
    with pytest.raises(RuntimeError), started(command) as process:
        raise RuntimeError
    with pytest.raises(ProcessLookupError):
        os.kill(process.pid, 0)


def test_a_process_that_ends_before_the_event_is_a_failure(tmp_path):
    command = [sys.executable, "-S", "-c", "import sys; sys.exit('no such data')"]
    with (
        pytest.raises(AssertionError, match=r"ended with 1: .*no such data"),
        started(command, stderr=subprocess.PIPE, text=True) as process,
    ):
        wait_for(has_lines(tmp_path / "log", 1), process)


def test_a_file_has_lines_when_they_are_complete(tmp_path):
    event = has_lines(tmp_path / "log", 2)
    assert not event()
    (tmp_path / "log").write_text("1\n2")
    assert not event()
    (tmp_path / "log").write_text("1\n2\n")
    assert event()


def test_what_a_finished_command_said():
    done = finished([sys.executable, "-S", "-c", "print('well'); raise SystemExit(3)"])
    assert (done.returncode, done.stdout, done.stderr) == (3, "well\n", "")
