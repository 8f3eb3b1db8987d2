"""Errors as one paragraph; whole commands are tried in tests/faults and tests/integration."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import typer
from modes_obeyed import with_mode
from rich.console import Console

from lfmcw_app import complete_runs
from lfmcw_app.commands.execution import carry_out, reported_errors, stoppable
from lfmcw_app.errors import InputError
from lfmcw_app.stopping import Stopped


def test_a_users_error_is_one_paragraph_with_exit_code_2():
    output = io.StringIO()
    console = Console(file=output, width=40)
    with pytest.raises(typer.Exit) as caught, reported_errors(console):
        raise InputError("The first line.\n  The second line, which is longer than the console.")
    assert caught.value.exit_code == 2
    assert output.getvalue() == (
        "Error: The first line. The second line, which is longer than the console.\n"
    )


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), reported_errors(Console(file=io.StringIO())):
        raise ZeroDivisionError


def test_a_file_that_may_not_be_used_is_one_paragraph(tmp_path):
    output = io.StringIO()
    (tmp_path / "file").touch()
    with (
        with_mode(tmp_path / "file", 0),
        pytest.raises(typer.Exit) as caught,
        reported_errors(Console(file=output, width=40)),
    ):
        (tmp_path / "file").read_bytes()
    assert caught.value.exit_code == 2
    assert output.getvalue().startswith(
        f"Error: {tmp_path / 'file'} cannot be used (Permission denied). Nothing of it is lost."
    )


@pytest.mark.parametrize(
    ("cause", "words"),
    [
        (lambda folder: (folder / ("x" * 5000)).exists(), "xxx cannot be used (File name too long"),
        (lambda folder: (folder / "gone").read_text(), "gone cannot be used (No such file"),
        (lambda folder: folder.read_text(), "cannot be used (Is a directory"),
    ],
)
def test_what_the_system_refuses_is_one_paragraph(tmp_path, cause, words):
    output = io.StringIO()
    with pytest.raises(typer.Exit) as caught, reported_errors(Console(file=output, width=40)):
        cause(tmp_path)
    assert caught.value.exit_code == 2
    assert words in output.getvalue()


def test_a_working_directory_that_is_gone_is_told(tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    output = io.StringIO()
    with pytest.raises(typer.Exit) as caught, reported_errors(Console(file=output)):
        pytest.fail("the command has begun")
    assert caught.value.exit_code == 2
    assert "The working directory no longer exists" in output.getvalue()


def test_an_error_that_only_looks_like_the_systems_is_a_bug():
    with pytest.raises(OSError, match="in words"), reported_errors(Console(file=io.StringIO())):
        raise OSError("in words")


def test_a_name_in_an_error_steers_no_terminal():
    output = io.StringIO()
    with pytest.raises(typer.Exit), reported_errors(Console(file=output)):
        raise InputError("The file a\x1b[2J.png is empty.")
    assert output.getvalue() == "Error: The file a\N{REPLACEMENT CHARACTER}[2J.png is empty.\n"


@pytest.mark.parametrize("turned_into", [KeyboardInterrupt, AttributeError])
def test_a_second_interrupt_ends_at_once_whatever_becomes_of_it(capsys, turned_into):
    """It may strike in an import, which then fails in another way."""
    console = Console(file=io.StringIO())
    with pytest.raises(typer.Exit) as caught, stoppable(console, "resume"):  # noqa: PT012
        signal.raise_signal(signal.SIGINT)
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise turned_into from None
    assert caught.value.exit_code == 130
    assert "Interrupted at once; the last checkpoint is kept." in console.file.getvalue()


def test_a_run_is_complete_only_if_its_data_are_as_before(tmp_path, monkeypatch):
    """Neither that nor that it resumes is said before."""
    monkeypatch.setattr(complete_runs, "is_complete", lambda folder: True)
    folder = SimpleNamespace(path=tmp_path, begun=True, changed_environment=lambda: ["torch 1 → 2"])
    output = io.StringIO()

    def changed():
        raise InputError("The data have changed.")

    with pytest.raises(InputError, match="The data have changed"):
        carry_out(folder, Console(file=output), "module", changed, tensorboard=False)
    assert output.getvalue() == f"Run folder: {tmp_path}\n"


@pytest.mark.parametrize(
    ("begun", "place"), [(True, "its last checkpoint"), (False, "its beginning")]
)
def test_a_stop_before_the_first_round_tells_where_it_resumes(tmp_path, monkeypatch, begun, place):
    """The checkpoint of a run that resumes is not loaded yet."""
    monkeypatch.setattr(complete_runs, "is_complete", lambda folder: False)
    folder = SimpleNamespace(path=tmp_path, begun=begun, changed_environment=list)
    console = Console(file=io.StringIO(), width=400)

    def stopped():
        raise Stopped(signal.SIGTERM)

    with pytest.raises(typer.Exit):
        carry_out(folder, console, "module", stopped, tensorboard=False)
    assert f"The run resumes from {place}. Resume with:" in console.file.getvalue()


def test_an_error_without_an_interrupt_is_none():
    with pytest.raises(AttributeError), stoppable(Console(file=io.StringIO()), "resume"):
        raise AttributeError


AT_THE_END = """
import atexit, gc
atexit.register(lambda: print(gc.get_freeze_count() > 1000))  # runs last
from lfmcw_app.commands.execution import main_of

def command() -> None:
    "A command."

main_of(command)
"""


def test_a_process_ends_without_a_search_for_garbage():
    """With torch it takes seconds after the last line."""
    done = subprocess.run(
        [sys.executable, "-c", AT_THE_END], capture_output=True, text=True, check=True
    )
    assert done.stdout == "True\n"
