"""What the command lines have in common."""

from __future__ import annotations

import datetime
import io
import os
import subprocess
import sys

import pytest
import torch
import typer
from rich.console import Console

from lfmcw_app import cli
from lfmcw_app.errors import InputError


@pytest.mark.parametrize(
    ("module", "words", "expected"),
    [
        ("run", "lfmcw fash", "fashion-mnist"),
        ("run", "lfmcw --preset sm", "small"),
        ("run", "lfmcw --space pc", "pcdarts"),
        ("evaluate", "lfmcw-evaluate DARTS", "DARTS_V2"),
    ],
)
def test_the_shell_completes_options_and_values(module, words, expected):
    program = words.split()[0]
    variable = f"_{program.upper().replace('-', '_')}_COMPLETE"
    environment = {
        **os.environ,
        variable: "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split()) - 1),
    }
    code = f"import sys; sys.argv = [{program!r}]; from lfmcw_app.{module} import main; main()"
    finished = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=120
    )
    assert expected in finished.stdout.split()


def test_completion_offers_only_what_begins_alike():
    assert cli.completing("smoke", "small", "paper")("sm") == ["smoke", "small"]


@pytest.mark.parametrize(
    ("threads", "preset", "expected"),
    [(None, "smoke", [1]), (None, "small", [1]), (None, "paper", []), (3, "smoke", [3])],
)
def test_small_presets_take_one_thread(threads, preset, expected, monkeypatch):
    found = []
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    cli.set_threads(threads, preset)
    assert found == expected


@pytest.mark.parametrize(
    ("dataset", "preset"),
    [("digits", "smoke"), ("fashion-mnist", "small"), ("cifar10", "paper"), ("imagenet", "paper")],
)
def test_a_data_set_has_its_preset(dataset, preset):
    assert cli.default_preset(dataset) == preset
    assert cli.resolve_recipe(dataset, None, None, None, None).preset == preset


def test_imagenet_is_searched_with_partial_channels():
    assert cli.resolve_recipe("imagenet", None, None, None, None).search.space == "pcdarts"
    assert cli.resolve_recipe("cifar10", None, None, None, None).search.space == "darts"


@pytest.mark.parametrize(
    ("assign", "space", "words"),
    [
        (["search.space=darts"], "pdarts", "contradict each other"),
        (["dataset=cifar10"], None, "drop --set dataset="),
        (["search.chanels=8"], None, "Did you mean 'channels'"),
    ],
)
def test_settings_that_contradict_are_refused(assign, space, words):
    with pytest.raises(InputError, match=words):
        cli.resolve_recipe("digits", None, None, assign, None, space=space)


def test_a_space_by_set_has_the_presets_settings_for_it():
    by_option = cli.resolve_recipe("digits", None, None, None, None, space="pdarts")
    by_set = cli.resolve_recipe("digits", None, None, ["search.space=pdarts"], None)
    assert by_option == by_set


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.pick_device("auto") == cli.pick_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="has no CUDA"):
        cli.pick_device("cuda")
    with pytest.raises(InputError, match="cpu, cuda or auto, got 'tpu'"):
        cli.pick_device("tpu")


def test_a_folder_of_the_same_second_has_a_number(tmp_path, monkeypatch):
    class Noon(datetime.datetime):
        @classmethod
        def now(cls):
            return cls(2026, 1, 2, 12, 0, 0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "datetime", Noon)
    first = cli.fresh_folder("digits")
    assert str(first) == "runs/digits-20260102-120000"
    first.mkdir(parents=True)
    assert str(cli.fresh_folder("digits")) == "runs/digits-20260102-120000-2"


def test_a_users_error_is_one_paragraph_with_exit_code_2():
    output = io.StringIO()
    console = Console(file=output, width=40)
    with pytest.raises(typer.Exit) as caught, cli.reported_errors(console):
        raise InputError("The first line.\n  The second line, which is longer than the console.")
    assert caught.value.exit_code == 2
    assert output.getvalue() == (
        "Error: The first line. The second line, which is longer than the console.\n"
    )


def test_a_bug_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), cli.reported_errors(Console(file=io.StringIO())):
        raise ZeroDivisionError


def test_a_trial_is_a_run_of_its_own():
    cli.check_no_trial(None)
    with pytest.raises(InputError, match="starts a trial of its own"):
        cli.check_no_trial(3)
