"""The command line of the main job: what it asks for. Whole runs are tried in tests/integration."""

from __future__ import annotations

import pytest
import typer
import yaml
from typer.testing import CliRunner

from lfmcw_app.commands.run import run
from lfmcw_app.recipe_loading import load_recipe
from lfmcw_app.run_files import EVALUATED
from lfmcw_app.run_folder import RunFolder


def call(*arguments):
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(run)
    result = CliRunner().invoke(app, list(map(str, arguments)))
    return result.exit_code, " ".join(result.output.split())


def test_without_a_data_set_a_first_try_is_offered():
    code, printed = call()
    assert code == 2
    assert "Name a data set" in printed
    assert "python -m lfmcw_app.run digits" in printed


def test_the_recipe_of_the_options_is_printed():
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(run)
    options = ["digits", "--print-config", "--method=darts", "--seed=5", "--detect-collapse"]
    tree = yaml.safe_load(CliRunner().invoke(app, options).output)
    assert (tree["search"]["method"], tree["seed"]) == ("darts", 5)
    assert tree["detect_collapse"] is True


def test_a_flag_and_a_setting_must_agree():
    code, printed = call("digits", "--detect-collapse", "--set=detect_collapse=false")
    assert code == 2
    assert "--detect-collapse is True, and --set detect_collapse is False" in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--out", "elsewhere"), "resumes in its own folder"),
        (("--seed", "3"), "seed 0 → 3. This cannot change"),
        (("digits", "--seed", "3"), "has another recipe"),
        (("cifar10",), "has another recipe"),
        (("--max-steps", "2"), "starts a separate trial"),
    ],
)
def test_a_resumed_run_has_its_own_recipe(tmp_path, arguments, words):
    folder = RunFolder.create(tmp_path / "run", load_recipe("smoke"))
    code, printed = call("--resume", folder.path, *arguments)
    assert code == 2
    assert words in printed


def test_an_evaluation_is_not_resumed_as_a_search(tmp_path):
    folder = RunFolder.create(tmp_path / "run", load_recipe("smoke"))
    folder.write(EVALUATED, "{}")
    code, printed = call("--resume", folder.path)
    assert code == 2
    assert f"python -m lfmcw_app.evaluate --resume {folder.path}" in printed


def test_a_folder_in_use_is_refused_before_data_are_read(tmp_path):
    """The folder of images does not even exist."""
    (tmp_path / "mine.txt").touch()
    code, printed = call("folder:nowhere", "--preset", "smoke", "--out", tmp_path)
    assert code == 2
    assert "already holds something else" in printed
    assert "nowhere" not in printed
