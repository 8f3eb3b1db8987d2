"""Signals, and two runs in one folder: on the command line, in processes of their own."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from contextlib import ExitStack

import pytest
from filelock import FileLock
from interrupted_command import command as interrupted
from interrupted_command import is_held
from interrupted_runs import outcome
from started_processes import PATIENCE, finished, wait_for
from started_processes import started as started_process

import mlo
from lfmcw_app.errors import InputError
from lfmcw_app.run_folder import RunFolder

COMMAND = [sys.executable, "-m", "lfmcw_app.run", "--threads=1"]
PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


@pytest.fixture
def started(runs, tmp_path):
    """Starts a run in a process of its own and returns it after so many lines of metrics, held
    still.
    """
    with ExitStack() as stack:

        def start(lines):
            folder = tmp_path / "run"
            config = tmp_path / "recipe.yaml"
            config.write_text(runs.recipe().to_yaml())
            given = ("digits", "--preset=smoke", f"--config={config}", f"--out={folder}")
            command = interrupted(signal.SIGSTOP, lines, "--threads=1", *given)
            process = stack.enter_context(started_process(command, **PIPES))
            wait_for(lambda: is_held(process), process)
            return process, folder

        yield start


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_a_signal_saves_the_run_which_resumes_bit_for_bit(started, runs, whole, number, code):
    """A signal saves and ends the run, which resumes bit for bit."""
    process, folder = started(3)
    process.send_signal(number)
    process.send_signal(signal.SIGCONT)
    printed, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, errors
    assert "the state is saved. The run resumes from the end of round" in printed
    assert f"Resume with: python -m lfmcw_app.run --resume {folder}" in printed
    assert "Traceback" not in errors
    lines = (folder / "metrics.jsonl").read_bytes().count(b"\n")
    assert lines < 15
    saved = mlo.load_checkpoint(folder / "search.pt")
    assert saved["optimizer"]["round"] == min(lines, 6)  # the very last round
    runs.resume(folder)
    assert outcome(folder) == whole


@pytest.mark.slow
def test_a_second_run_in_a_folder_is_refused(started, runs, whole):
    """A second run in a folder is refused until the first is killed."""
    process, folder = started(2)
    second = finished([*COMMAND, "--resume", folder])
    assert second.returncode == 75
    assert "Another process is running in" in second.stderr
    assert "Traceback" not in second.stderr
    process.kill()
    process.wait()
    runs.resume(folder)
    assert outcome(folder) == whole


def test_a_folder_that_another_process_holds_is_refused(runs, tmp_path):
    """A folder that another process is about to begin in is refused."""
    with (
        FileLock(tmp_path / ".lock"),
        pytest.raises(InputError, match="Another process is running"),
    ):
        RunFolder.create(tmp_path, runs.recipe())
    RunFolder.create(tmp_path, runs.recipe())


# ------------------------------ signals alone


def program(body):
    """Runs a program under `stop_signals` with a short grace; returns its exit code, output and
    errors.
    """
    code = textwrap.dedent(
        """
        import hashlib, os, signal
        from lfmcw_app import stopping
        stopping.GRACE = 0.2
        def long_instruction():  # one that the interpreter cannot interrupt
            hashlib.pbkdf2_hmac("sha512", b"", b"", 1 << 24)
        """
    ) + textwrap.dedent(body)
    done = finished([sys.executable, "-c", code])
    return done.returncode, done.stdout, done.stderr


def test_a_round_that_outlasts_the_grace_is_given_up():
    """A round that outlasts the grace is given up with exit code 0."""
    code, printed, errors = program(
        """
        import threading
        with stopping.stop_signals("Resume with: THIS"):
            threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGTERM)).start()
            long_instruction()
            print("survived", flush=True)
        """
    )
    assert (code, printed) == (0, "")
    assert "did not end within 0 s, so it is given up. The last checkpoint is kept:" in errors
    assert "the run resumes from its beginning. Resume with: THIS" in errors


def test_a_round_that_ends_in_time_is_not_given_up():
    """A round that ends in time is not given up while its state is written.

    The thread that would give it up hears of the end while that is being done.
    """
    code, printed, errors = program(
        f"""
        import threading
        def say(*words):  # in one piece, from two threads
            os.write(1, (" ".join(map(str, words)) + "\\n").encode())
        told = threading.Event()
        class Settled(threading.Event):
            def wait(self, timeout):
                say("within", timeout)
                ended = super().wait({PATIENCE})
                told.set()
                return ended
        stopping._settled = Settled()
        with stopping.stop_signals():
            os.kill(os.getpid(), signal.SIGTERM)
            say(stopping.requested() == signal.SIGTERM)
            stopping.settled()
            say("written", told.wait({PATIENCE}))
        """
    )
    assert (code, errors) == (0, "")
    assert sorted(printed.splitlines()) == ["True", "within 0.2", "written True"]


def test_the_second_interrupt_stops_at_once():
    code, printed, errors = program(
        """
        try:
            with stopping.stop_signals():
                os.kill(os.getpid(), signal.SIGINT)
                print(stopping.requested() == signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)
                print("survived")
        except KeyboardInterrupt:
            print("stopped", stopping.requested())
        """
    )
    assert (code, printed) == (0, "True\nstopped None\n")
    assert "Press Ctrl-C again to stop at once" in errors


def test_afterwards_signals_mean_what_they_meant_before():
    code, printed, _ = program(
        """
        with stopping.stop_signals():
            pass
        print("left", flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        """
    )
    assert (code, printed) == (-signal.SIGTERM, "left\n")
