"""What a command line that cannot be read gets as an answer."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from lfmcw_app.__main__ import COMMANDS
from lfmcw_app.commands.command_line import command_line

ALL = command_line(COMMANDS, help="All of them.")


def said(*arguments):
    """What is printed, as one line without the frame."""
    result = CliRunner().invoke(ALL, arguments, env={"COLUMNS": "100", "NO_COLOR": "1"})
    assert result.exit_code == 2
    return " ".join(result.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (("run", "digits", "--presett", "small"), "--preset"),
        (("run", "digits", "--seeds", "3"), "--seed"),
        (("run", "digits", "--QUIET"), "--quiet"),
        (("run", "digits", "--dry_run"), "--dry-run"),
        (("export", "runs/x", "--inputs=pixels"), "--input"),
        (("predict", "x", "--helt-out"), "--held-out"),
    ],
)
def test_an_unknown_option_gets_the_one_most_like_it(arguments, meant):
    text = said(*arguments)
    assert f"Did you mean {meant}?" in text
    assert "Possible options" not in text  # Typer's own list, with unrelated ones


@pytest.mark.parametrize("given", ["--lambda", "-x", "--resolution"])
def test_no_unrelated_option_is_suggested(given):
    text = said("run", "digits", given, "3")
    assert f"There is no option {given}." in text
    assert "Did you mean" not in text
    assert "--set KEY=VALUE" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("export", "runs/x"), ["--to", "onnx", "torch"]),
        (("sample", "runs/x"), ["--out", "PNG", "folder"]),
        (("table",), ["name", "table2", "ablation"]),
        (("draw",), ["genotype", "DARTS_V2", "random:N"]),
        (("predict",), ["RUN", "Run folder"]),
        (("report",), ["RUN_DIR", "Run folders"]),
        (("run", "digits", "--preset"), ["--preset", "needs a value", "smoke, small"]),
    ],
)
def test_what_is_missing_is_described(arguments, words):
    text = said(*arguments)
    assert all(word in text for word in words), text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "digits", "--seed", "x"), "must be a whole number, got 'x'"),
        (("run", "digits", "--seed=1.5"), "must be a whole number, got '1.5'"),
        (("table", "table2", "--jobs", "0"), "must be at least 1, got '0'"),
        (("draw", "random:0", "--nodes", "13"), "must be at most 12, got '13'"),
    ],
)
def test_a_wrong_number_is_shown_with_what_is_needed(arguments, words):
    assert words in said(*arguments)


def test_a_value_without_its_option_is_explained():
    text = said("run", "digits", "small")
    assert "(small). The value of an option needs the option's name before it" in text
