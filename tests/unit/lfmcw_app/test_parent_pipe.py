"""Children end with their parent, even when it is killed."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from lfmcw_app import parent_pipe

# Loaded from its file: the package imports torch, which takes seconds.
LOADED = f"import runpy, sys; pipe = runpy.run_path({parent_pipe.__file__!r}); "
CHILD = LOADED + "pipe['end_with_parent'](); print('child', flush=True); sys.stdin.read()"
PARENT = (
    LOADED
    + "child = pipe['start_child']([sys.executable, '-c', sys.argv[1]], stdin=-1); "
    + "sys.stdin.read()"
)


@pytest.fixture
def parent():
    """A process with a child that waits for ever, both writing to one pipe."""
    process = subprocess.Popen(
        [sys.executable, "-c", PARENT, CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        assert process.stdout.readline() == "child\n"
        yield process
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["SIGKILL", "SIGTERM"])
def test_a_killed_parent_takes_its_child_with_it(parent, how):
    os.kill(parent.pid, how)
    assert parent.stdout.read() == ""  # which ends when the child has, too


def test_a_parent_that_ends_well_takes_its_child_with_it(parent):
    parent.stdin.close()
    assert parent.stdout.read() == ""
    assert parent.wait() == 0


def test_a_process_without_such_a_parent_is_left_alone(monkeypatch):
    monkeypatch.delenv(parent_pipe.VARIABLE, raising=False)
    parent_pipe.end_with_parent()


def test_a_child_that_does_not_start_leaves_no_descriptors(monkeypatch):
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(FileNotFoundError):
        parent_pipe.start_child(["no such program"])
    assert len(os.listdir("/proc/self/fd")) == before


def test_grandchildren_do_not_watch_the_grandparent(monkeypatch):
    reader, writer = os.pipe()
    monkeypatch.setenv(parent_pipe.VARIABLE, str(reader))
    monkeypatch.setattr(parent_pipe.threading.Thread, "start", lambda self: None)
    parent_pipe.end_with_parent()
    assert parent_pipe.VARIABLE not in os.environ
    assert not os.get_inheritable(reader)
    os.close(reader)
    os.close(writer)


def test_a_killed_torchrun_takes_its_processes_with_it():
    """Only the one whose parent has ended ends."""
    child = CHILD.replace("sys.stdin.read()", "import time; time.sleep(600)")
    parent = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', sys.argv[1]]).wait()"
    with subprocess.Popen(
        [sys.executable, "-c", parent, child],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, parent_pipe.LAUNCHED: "none"},
    ) as process:
        try:
            assert process.stdout.readline() == "child\n"
            process.kill()
            assert process.stdout.read() == "torchrun has ended, so this process ends too.\n"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
