"""Errors as one paragraph; whole commands are tried in tests/faults and tests/integration."""

from __future__ import annotations

import io

import pytest
import typer
from rich.console import Console

from lfmcw_app.commands.execution import reported_errors
from lfmcw_app.errors import InputError


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
