"""What is printed may get lost, and no run with it."""

from __future__ import annotations

import os
import sys

from started_processes import finished

from lfmcw_app.steady_output import steady_output

PROGRAM = """
import sys
from pathlib import Path
from rich.console import Console
from lfmcw_app.steady_output import steady_output
with steady_output():
    for number in range(3):
        Console(soft_wrap=True).print(f"line {number} → α" + "x" * 10_000)
        print("error", file=sys.stderr)
    Path(sys.argv[1]).write_text("done")
    sys.exit(int(sys.argv[2]))
"""


def program(folder, *, code=0, **streams):
    """The exit code of a program that prints, and whether it came to its end."""
    command = [sys.executable, "-c", PROGRAM, str(folder / "file"), str(code)]
    done = finished(command, text=False, **streams)
    return done, (folder / "file").exists()


def test_a_reader_that_has_gone_ends_nothing(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    done, complete = program(tmp_path, stdout=writer)
    assert (done.returncode, complete) == (0, True)
    assert done.stderr == b"error\n" * 3


def test_a_full_disk_behind_the_output_is_said_at_the_end(tmp_path):
    with open("/dev/full", "wb") as full:
        done, complete = program(tmp_path, stdout=full)
    assert (done.returncode, complete) == (2, True)
    assert b"Error: What was printed is incomplete (No space left on device)." in done.stderr


def test_errors_that_cannot_be_printed_end_nothing_either(tmp_path):
    with open("/dev/full", "wb") as full:
        done, complete = program(tmp_path, code=3, stdout=full, stderr=full)
    assert (done.returncode, complete) == (3, True)


def test_what_an_encoding_lacks_is_an_escape(tmp_path):
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done, complete = program(tmp_path, env=ascii_only)
    assert (done.returncode, complete) == (0, True)
    assert b"line 0 \\u2192 \\u03b1xx" in done.stdout


def test_the_streams_are_put_back():
    before = sys.stdout, sys.stderr
    with steady_output():
        assert sys.stdout is not before[0]
    assert (sys.stdout, sys.stderr) == before


def test_a_process_without_streams_has_none(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    with steady_output():
        print("nowhere")
    assert sys.stdout is None
