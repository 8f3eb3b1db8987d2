"""Whole runs; most of them are tried in tests/integration."""

from __future__ import annotations

import torch
from rich.console import Console

from lfmcw_app.complete_runs import run
from lfmcw_app.data import load_dataset
from lfmcw_app.recipe import load_recipe
from lfmcw_app.run_folder import RunFolder


def test_a_complete_run_is_not_run_again(tmp_path):
    folder = RunFolder.create(tmp_path / "run", load_recipe("smoke"))
    folder.write("result.json", '{"test_error_percent": 1.5}')
    found = run(folder, load_dataset("digits"), Console(quiet=True), torch.device("cpu"))
    assert found == {"test_error_percent": 1.5}
    assert not folder.metrics.exists()
