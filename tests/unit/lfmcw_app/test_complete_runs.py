"""Whole runs; most of them are tried in tests/integration."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rich.console import Console

from lfmcw_app.complete_runs import run
from lfmcw_app.data import load_dataset
from lfmcw_app.errors import InputError
from lfmcw_app.fingerprint import Fingerprint
from lfmcw_app.pictures import describe_dataset
from lfmcw_app.recipe_loading import load_recipe
from lfmcw_app.run_folder import RunFolder


def test_a_complete_run_is_not_run_again(tmp_path):
    folder = RunFolder.create(tmp_path / "run", load_recipe("smoke"))
    folder.write("result.json", '{"test_error_percent": 1.5}')
    found = run(folder, load_dataset("digits"), Console(quiet=True), torch.device("cpu"))
    assert found == {"test_error_percent": 1.5}
    assert not folder.metrics.exists()


def test_a_complete_run_is_not_shown_as_that_of_other_data(tmp_path):
    folder = RunFolder.create(tmp_path / "run", load_recipe("smoke"))
    folder.write("result.json", '{"test_error_percent": 1.5}')
    digits = load_dataset("digits")
    describe_dataset(digits, folder)
    other = replace(digits, fingerprint=Fingerprint.of_name("other"))
    with pytest.raises(InputError, match="The data have changed"):
        run(folder, other, Console(quiet=True), torch.device("cpu"))
    assert run(folder, digits, Console(quiet=True), torch.device("cpu"))


def test_a_run_completed_while_it_waited_is_not_repeated(tmp_path, monkeypatch):
    """Another process completes it, and clears its checkpoints, before this one has the lock."""
    folder = RunFolder.create(tmp_path / "run", load_recipe("smoke"))
    locked = RunFolder.locked

    def completed_before(self):
        self.write("result.json", '{"test_error_percent": 1.5}')
        return locked(self)

    monkeypatch.setattr(RunFolder, "locked", completed_before)
    found = run(folder, load_dataset("digits"), Console(quiet=True), torch.device("cpu"))
    assert found == {"test_error_percent": 1.5}
    assert not folder.metrics.exists()


def test_a_run_that_was_stopped_in_its_clearing_is_complete(tmp_path):
    """A checkpoint of the training that is left over starts no second one."""
    folder = RunFolder.create(tmp_path / "run", load_recipe("smoke"))
    folder.keep = "results"
    folder.complete('{"test_error_percent": 1.5}', {})
    describe_dataset(load_dataset("digits"), folder)
    (folder.path / "training.pt").write_text("left over")
    again = RunFolder.open(folder.path)
    found = run(again, load_dataset("digits"), Console(quiet=True), torch.device("cpu"))
    assert found == {"test_error_percent": 1.5}
    assert not (folder.path / "training.pt").exists()
    assert not folder.metrics.exists()
