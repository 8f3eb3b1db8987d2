"""The options that command lines share, and what their values mean."""

from __future__ import annotations

import datetime
import os
import sys
from pathlib import Path

import pytest
import torch
from started_processes import finished

from lfmcw_app.commands import options
from lfmcw_app.errors import InputError
from lfmcw_app.plain_yaml import parse_yaml
from lfmcw_app.readers import DATASETS
from lfmcw_app.recipe_loading import load_recipe, validate_recipe
from lfmcw_app.spaces import SPACES


@pytest.mark.parametrize("name", ["😀/t.csv", "{seed}.csv", 'a "b" #c: d.csv', "1e-3"])
def test_an_option_that_names_a_path_takes_any_name(name):
    paths = {"lookup.file": Path(name), "search.init.run": None}
    settings = options.given_settings(["seed=3"], paths)
    assert settings == {"seed": 3, "lookup.file": name}
    recipe = load_recipe("smoke", overrides=settings)
    assert validate_recipe(parse_yaml(recipe.to_yaml())).lookup.file == name


def test_an_option_that_names_a_path_agrees_with_settings():
    def given(setting):
        return options.given_settings([setting], {"lookup.file": Path("t.csv")})

    assert given("lookup.file=t.csv") == {"lookup.file": "t.csv"}
    for other in ("lookup.file=other.csv", "lookup={file: other.csv}"):
        with pytest.raises(InputError, match=r"--lookup is 't\.csv', and --set lookup\.file is"):
            given(other)


def test_a_path_that_is_no_text_is_named():
    settings = options.given_settings(None, {"lookup.file": Path("t\udcff.csv")})
    with pytest.raises(InputError, match=r"'lookup\.file'.* is no text in UTF-8.* rename that"):
        load_recipe("smoke", overrides=settings)


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
    completed = finished([sys.executable, "-c", code], env=environment)
    assert expected in completed.stdout.split()


def test_the_names_that_help_shows_are_those_of_the_tables():
    assert tuple(DATASETS) == options.DATASETS
    assert list(SPACES) == options.all_spaces()


def test_completion_offers_only_what_begins_alike():
    assert options.completing("smoke", "small", "paper")("sm") == ["smoke", "small"]


@pytest.mark.parametrize(
    ("threads", "preset", "expected"),
    [(None, "smoke", [1]), (None, "small", [1]), (None, "paper", []), (3, "smoke", [3])],
)
def test_small_presets_take_one_thread(threads, preset, expected, monkeypatch):
    found = []
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    options.set_threads(threads, preset)
    assert found == expected


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert options.pick_device("auto") == options.pick_device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match="has no CUDA"):
        options.pick_device("cuda")
    with pytest.raises(InputError, match="cpu, cuda or auto, got 'tpu'"):
        options.pick_device("tpu")


def test_the_meta_device_only_counts(monkeypatch):
    assert options.pick_device("meta", counts=True) == torch.device("meta")
    with pytest.raises(InputError, match=r"has shapes but no numbers.*--dry-run"):
        options.pick_device("meta")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"memory of one process.*without torchrun"):
        options.pick_device("meta", counts=True)


def test_a_folder_of_the_same_second_has_a_number(tmp_path, monkeypatch):
    class Noon(datetime.datetime):
        @classmethod
        def now(cls):
            return cls(2026, 1, 2, 12, 0, 0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(options, "datetime", Noon)
    first = options.fresh_folder("digits")
    assert str(first) == "runs/digits-20260102-120000"
    assert first.is_dir()  # made here, so that no other process can take it
    assert str(options.fresh_folder("digits")) == "runs/digits-20260102-120000-2"


def test_a_trial_is_a_run_of_its_own():
    options.check_no_trial(None)
    with pytest.raises(InputError, match="starts a separate trial"):
        options.check_no_trial(3)


@pytest.mark.parametrize("module", ["run", "evaluate", "table"])
def test_help_waits_for_no_pictures(module):
    """matplotlib takes a second to import; `--help` does not need it."""
    code = f"import lfmcw_app.{module}, sys; sys.exit('matplotlib' in sys.modules)"
    assert finished([sys.executable, "-c", code]).returncode == 0


def test_all_commands_are_listed_by_the_package():
    printed = finished([sys.executable, "-m", "lfmcw_app", "--help"]).stdout
    for command in ("run", "evaluate", "report", "table"):
        assert f" {command} " in printed


def test_what_a_run_keeps_is_one_of_a_few_names():
    for name in ("all", "metrics", "results"):
        options.check_keep(name)
    with pytest.raises(InputError, match="Did you mean 'results'"):
        options.check_keep("result")


@pytest.mark.parametrize("name", ["pictures", "pictures/run", "link/run", "pictures/../pictures/x"])
def test_runs_are_not_made_among_the_images(tmp_path, name):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "link").symlink_to("pictures")
    with pytest.raises(InputError, match="is in the folder of the images"):
        options.check_outside(
            f"folder:{tmp_path / 'pictures'}", tmp_path / "other", tmp_path / name
        )


def test_runs_may_be_made_beside_the_images(tmp_path):
    options.check_outside(f"folder:{tmp_path / 'pictures'}", tmp_path / "pictures-2")
    options.check_outside("digits", tmp_path)
