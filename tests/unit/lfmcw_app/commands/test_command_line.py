"""What `--help` shows of every command, and what a wrong option or command gets as an answer."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from lfmcw_app.__main__ import COMMANDS
from lfmcw_app.commands.command_line import command_line

ALL = command_line(COMMANDS, help="All of them.")


def invoke(app, *arguments):
    """What a command line prints on 100 columns, and its exit code."""
    result = CliRunner().invoke(app, arguments, env={"COLUMNS": "100", "NO_COLOR": "1"})
    return result.output, result.exit_code


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.__name__)
def test_a_flag_is_shown_without_a_type(command):
    for app, arguments in ((command_line([command]), ()), (ALL, (command.__name__,))):
        text, code = invoke(app, *arguments, "--help")
        assert code == 0
        assert "--help" in text
        assert "bool" not in text.lower()


def test_an_option_with_a_value_keeps_its_type():
    text, _ = invoke(ALL, "run", "--help")
    (line,) = (line for line in text.splitlines() if " --seed " in line)
    assert "int" in line.lower()


def test_a_paragraph_of_help_is_wrapped_as_a_whole():
    def command():
        """First line.

        A paragraph that was broken
        in the middle of a line.
        """

    text, _ = invoke(command_line([command]), "--help")
    assert "A paragraph that was broken in the middle of a line." in text


def test_without_a_command_the_help_lists_all():
    text, code = invoke(ALL)
    assert code == 2
    for command in COMMANDS:
        assert f" {command.__name__} " in text


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (("run", "digits", "--quite"), "--quiet"),
        (("run", "--resme", "runs/x"), "--resume"),
        (("report", "a", "--compar"), "--compare"),
        (("table", "ablation", "--dry_run"), "--dry-run"),
        (("evalute",), "evaluate"),
    ],
)
def test_a_typing_error_gets_the_name_that_was_meant(arguments, meant):
    text, code = invoke(ALL, *arguments)
    assert code == 2
    assert meant in text


def test_a_flag_refuses_a_value():
    text, code = invoke(ALL, "run", "digits", "--quiet=yes")
    assert code == 2
    assert "--quiet" in text
    assert "value" in text
