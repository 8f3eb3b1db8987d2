"""Ctrl-C while a command starts, in processes of their own."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

STRIKE = """
import runpy, signal, sys

class Strike:
    def find_spec(self, name, *more):
        if name == {module!r}:
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Strike())
sys.argv = ["command", *{arguments!r}]
runpy.run_module({command!r}, run_name="__main__")
"""
"""A command that is interrupted when it imports a module."""

TURNED = """
from lfmcw_app.commands.interrupts import answered_interrupts
import signal
with answered_interrupts():
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise AttributeError("half an import") from None
"""

COMPLETED = """
from lfmcw_app.commands.interrupts import answered_interrupts
from lfmcw_app.output_files import new_file
from pathlib import Path
import signal, sys
with answered_interrupts():
    with new_file(Path(sys.argv[1])) as path:
        path.touch()
    signal.raise_signal(signal.SIGINT)
"""

IGNORED = """
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
from lfmcw_app.commands.interrupts import answered_interrupts
with answered_interrupts():
    signal.raise_signal(signal.SIGINT)
print("goes on")
"""

EVALUATION = ("random:0", "digits")

PROJECT = tomllib.loads((Path(__file__).parents[4] / "pyproject.toml").read_text("utf-8"))
SCRIPTS = PROJECT["project"]["scripts"]
"""Installed command → module:function."""


def _ended(program, *arguments):
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize(
    ("command", "arguments", "module"),
    [
        ("lfmcw_app.run", ["digits"], "typer"),
        ("lfmcw_app.run", ["digits"], "torch"),
        ("lfmcw_app.evaluate", EVALUATION, "torch"),
        ("lfmcw_app", ["evaluate", *EVALUATION], "torch"),
        ("lfmcw_app.report", ["folder"], "torch"),
    ],
)
def test_an_interrupted_start_is_one_line(command, arguments, module):
    program = STRIKE.format(module=module, command=command, arguments=arguments)
    assert _ended(program) == (130, ["Interrupted; nothing was saved."])


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_installed_command_answers_while_it_is_imported(script):
    module, _, name = SCRIPTS[script].partition(":")
    program = STRIKE.partition("runpy.run_module")[0] + "from {command} import {name}"
    program = program.format(module="typer", arguments=[], command=module, name=name)
    assert _ended(program) == (130, ["Interrupted; nothing was saved."])


def test_an_interrupt_that_became_another_error_is_one_line():
    assert _ended(TURNED) == (130, ["Interrupted; nothing was saved."])


def test_an_interrupt_after_a_complete_file_says_so(tmp_path):
    told = "Interrupted; the files that were complete are kept."
    assert _ended(COMPLETED, str(tmp_path / "file")) == (130, [told])


def test_an_ignored_interrupt_stays_ignored():
    assert _ended(IGNORED) == (0, [])
