"""Numbers that are lost in a run: the policies of the recipe, their files, and the same bytes after
a kill.
"""

from __future__ import annotations

import json

import pytest
import torch
from interrupted_runs import outcome

import mlo
from lfmcw_app.data import Batches
from lfmcw_app.errors import InputError, NumbersWarning
from lfmcw_app.phase import ROLLBACKS
from lfmcw_app.run_folder import DIAGNOSES


@pytest.fixture
def poisoned(monkeypatch):
    """Makes the batches at these positions of every stream of so many images hold a NaN."""
    batch = Batches.batch

    def install(images, positions):
        def poisoning(self, index):
            found, labels = batch(self, index)
            if len(self._images) == images and index in positions:
                found[0, 0, 0, 0] = float("nan")
            return found, labels

        monkeypatch.setattr(Batches, "batch", poisoning)

    return install


SEARCH, TRAINING = 40, 60
"""Images of each stream of the search and of the training; see RECIPE."""


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_stop_leaves_a_diagnostic_file(runs, poisoned, tmp_path):
    """Stop names problem, round and term, and leaves a diagnostic file."""
    folder = tmp_path / "run"
    poisoned(SEARCH, {3})
    with pytest.raises(
        InputError,
        match=r"Round 4, problem 'w2': its loss is not finite.*batch holds.*nonfinite-w2-round-4",
    ):
        runs.start(folder)
    found = mlo.load_checkpoint(folder / "nonfinite-w2-round-4.pt")
    assert (found["problem"], found["round"], found["term"]) == ("w2", 4, "loss")
    assert found["nonfinite_batch"] is True
    assert torch.isnan(found["batches"][0]).sum() == 1
    assert len(lines(folder)) == 3
    assert mlo.load_checkpoint(folder / "search.pt")["optimizer"]["round"] == 2


@pytest.mark.filterwarnings("ignore::lfmcw_app.errors.NumbersWarning")
def test_skip_continues_and_says_so_in_the_metrics(runs, poisoned, tmp_path):
    poisoned(TRAINING, {1, 4})
    with pytest.warns(NumbersWarning, match="Round 2, problem 'network'"):
        runs.start(tmp_path / "run", on_nonfinite="skip")
    training = [line for line in lines(tmp_path / "run") if line["phase"] == "training"]
    assert [line.get("skipped") for line in training] == [
        {"network": "loss"} if index in (1, 4) else None for index in range(9)
    ]
    assert "network" not in training[1]["losses"]


@pytest.mark.filterwarnings("ignore::lfmcw_app.errors.NumbersWarning")
def test_diagnostic_files_are_bounded(runs, poisoned, tmp_path):
    poisoned(TRAINING, set(range(0, 100)) - {0, 8})
    runs.start(tmp_path / "run", on_nonfinite="skip")
    assert len(list((tmp_path / "run").glob("nonfinite-*.pt"))) == DIAGNOSES


def test_skip_ends_where_too_many_in_a_row_are_lost(runs, poisoned, tmp_path):
    poisoned(TRAINING, set(range(2, 100)))
    with (
        pytest.raises(InputError, match="Round 13, problem 'network'"),
        pytest.warns(NumbersWarning),
    ):
        runs.start(tmp_path / "run", on_nonfinite="skip", **{"evaluation.epochs": 6})


@pytest.mark.filterwarnings("ignore::lfmcw_app.errors.NumbersWarning")
@pytest.mark.parametrize("die_after", [4, 5, 7, 12])
def test_rollback_repeats_rounds_on_other_batches(runs, poisoned, tmp_path, die_after):
    """Rollback repeats the rounds since the checkpoint on other batches, also after a kill."""
    poisoned(SEARCH, {3})
    runs.start(tmp_path / "whole", on_nonfinite="rollback")
    # The lines since the checkpoint are cut.
    assert [line["round"] for line in lines(tmp_path / "whole")][:6] == [1, 2, 3, 4, 5, 6]
    checkpoint = mlo.load_checkpoint(tmp_path / "whole" / "search.pt")
    position = checkpoint["optimizer"]["problems"]["w2"]["data"]["data"]["position"]
    assert position == 8  # two rounds were made twice
    assert checkpoint["standing"]["rollbacks"] == 0
    runs.start(tmp_path / "run", on_nonfinite="rollback", die_after=die_after)
    runs.resume(tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


@pytest.mark.filterwarnings("ignore::lfmcw_app.errors.NumbersWarning")
def test_rollback_works_before_the_first_checkpoint_that_is_due(runs, poisoned, tmp_path):
    poisoned(SEARCH, {0})
    with pytest.warns(
        NumbersWarning,
        match="goes back to round 0 of search, with other batches and noise \\(1 of 3",
    ):
        runs.start(tmp_path / "run", on_nonfinite="rollback")
    assert len(lines(tmp_path / "run")) == 15


def test_rollback_is_bounded(runs, poisoned, tmp_path):
    poisoned(SEARCH, {3, 5, 7, 8})
    with (
        pytest.warns(NumbersWarning) as told,
        pytest.raises(InputError, match="gone back to round 2 of search 3 times"),
    ):
        runs.start(tmp_path / "run", on_nonfinite="rollback")
    assert len([entry for entry in told if entry.category is NumbersWarning]) == ROLLBACKS


@pytest.mark.filterwarnings("ignore::lfmcw_app.errors.NumbersWarning")
def test_collapse_is_told_of_and_changes_nothing(runs, whole, tmp_path, monkeypatch):
    """Collapse is told of while the run continues to the same bytes."""
    monkeypatch.setattr(
        "lfmcw_app.collapse.CollapseDetector.update", lambda self, observation: ["It collapsed."]
    )
    with pytest.warns(NumbersWarning, match=r"Round 1: It collapsed\."):
        runs.start(tmp_path / "run", detect_collapse=True)
    assert outcome(tmp_path / "run")["metrics.jsonl"] == whole["metrics.jsonl"]
