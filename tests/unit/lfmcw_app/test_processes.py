"""The processes of torchrun, seen from one. Several are tried in tests/integration."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

import mlo
from lfmcw_app import processes
from lfmcw_app.errors import InputError
from lfmcw_app.processes import (
    FollowerFolder,
    all_gathered,
    check_batches,
    check_launch,
    from_main,
    is_main,
    joined,
    main_first,
    parallelism,
    quiet_unless_main,
    shared_folder,
    wait_for_all,
)
from lfmcw_app.recipe_loading import load_recipe
from lfmcw_app.run_folder import RunFolder


@pytest.fixture(autouse=True)
def _alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_a_single_process_is_the_main_one(monkeypatch):
    assert is_main()
    monkeypatch.setenv("RANK", "0")
    assert is_main()
    monkeypatch.setenv("RANK", "1")
    assert not is_main()


def test_only_the_main_process_talks(monkeypatch):
    output = io.StringIO()
    console = Console(file=output)
    assert quiet_unless_main(console) is console
    monkeypatch.setenv("RANK", "1")
    quiet_unless_main(console).print("hello")
    assert output.getvalue() == ""


def test_alone_there_is_nobody_to_wait_for():
    wait_for_all()
    assert all_gathered(3) == [3]
    assert from_main("value") == "value"
    with main_first():
        pass
    with joined(torch.device("cpu")) as device:
        assert device == torch.device("cpu")
    assert parallelism(load_recipe("smoke"), own_noise=True) is None


@pytest.mark.parametrize(
    ("changes", "searches", "words"),
    [
        ({"search.batch_size": 15}, True, "search.batch_size is 15"),
        ({"evaluation.batch_size": 15}, True, "evaluation.batch_size is 15"),
        (
            {"search.generator.warmup_rounds": 9, "search.generator.warmup_batch_size": 15},
            True,
            "search.generator.warmup_batch_size is 15",
        ),
        ({"evaluation.batch_size": 15}, False, "evaluation.batch_size is 15"),
    ],
)
def test_batches_that_cannot_be_shared_are_refused(changes, searches, words, monkeypatch):
    recipe = load_recipe("smoke", overrides=changes)
    check_batches(recipe, searches=searches)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=f"{words}.*a multiple of 2"):
        check_batches(recipe, searches=searches)


def test_a_training_alone_does_not_mind_the_searchs_batches(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_batches(load_recipe("smoke", overrides={"search.batch_size": 15}), searches=False)


def test_a_single_process_makes_the_run_folder(tmp_path):
    recipe = load_recipe("smoke")
    made = shared_folder(None, lambda: tmp_path / "run", recipe)
    assert type(made) is RunFolder
    assert (tmp_path / "run" / "config.yaml").exists()
    assert shared_folder(made, lambda: tmp_path / "other", recipe) is made
    assert not (tmp_path / "other").exists()


def test_a_follower_writes_nothing(tmp_path):
    recipe = load_recipe("smoke")
    RunFolder.create(tmp_path / "run", recipe)
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    follower = FollowerFolder(tmp_path / "run", recipe)
    assert not follower.writes
    follower.write("genotype.json", "{}")
    follower.log({"phase": "search", "round": 1})
    assert follower.save("search", None, {}) is True
    error = mlo.NonFiniteError("lost", problem="w", round=1, term="loss", data={})
    assert "first process" in follower.save_diagnosis(error)
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


@pytest.mark.parametrize(
    ("error", "words"),
    [
        ("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [::1]:1", "has ended"),
        ("Timed out waiting 1800000ms for recv operation to complete", "has waited 30 minutes"),
        ("Watchdog caught collective operation timeout: WorkNCCL(SeqNum=1) ran for 1", "hangs or"),
        ("mat1 and mat2 shapes cannot be multiplied", None),
    ],
)
def test_what_other_processes_did_is_told(error, words):
    told = processes._what_happened(error, 1)
    assert told is None if words is None else words in told


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "x"}, "RANK='x', which is no number"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE='-2', which is no number"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2, but no RANK"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost"}, "but no MASTER_PORT"),
    ],
)
def test_variables_of_torchrun_that_are_half_set(monkeypatch, variables, words):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=words):
        check_launch()
