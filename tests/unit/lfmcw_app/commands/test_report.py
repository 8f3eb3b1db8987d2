"""The command line of reports. Reports are tried in tests/integration."""

from __future__ import annotations

import pytest
import typer
from typer.testing import CliRunner

from lfmcw_app.commands.report import report


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["a", "--compare"], "needs two run folders or more"),
        (["a", "b", "--out=c"], "--out names one file"),
    ],
)
def test_options_that_do_not_fit_are_refused(arguments, words):
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(report)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert words in " ".join(result.output.split())
