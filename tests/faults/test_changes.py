"""Runs that are resumed with other settings: what changes, is written down, and is refused."""

from __future__ import annotations

import json

import pytest
from interrupted_runs import outcome

import mlo
from lfmcw_app.data import Batches
from lfmcw_app.errors import InputError
from lfmcw_app.resuming import read_changes
from lfmcw_app.run_files import CHANGES


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def rates(path, problem):
    optimizers = mlo.load_checkpoint(path)["optimizer"]["problems"][problem]["optimizers"]
    return [group["lr"] for own in optimizers.values() for group in own["param_groups"]]


def test_a_learning_rate_changes_from_the_checkpoint_on(runs, whole, tmp_path):
    """Up to the checkpoint the run is the same; from there on it has the new rates."""
    folder = tmp_path / "run"
    runs.start(folder, die_after=3)
    runs.resume(folder, **{"search.weights.lr": 0.05, "search.architecture.lr": 0.02})
    assert rates(folder / "search.previous.pt", "arch") == [0.02]
    # Round 4 of 6 is in the first of two epochs: the cosine's first step, of the new rate.
    schedule = mlo.load_checkpoint(folder / "search.previous.pt")["optimizer"]["problems"]["w2"]
    (scheduler,) = schedule["schedulers"].values()
    assert scheduler["base_lrs"] == [0.05]
    assert rates(folder / "search.previous.pt", "w2") == scheduler["_last_lr"] == [0.05]

    before = [json.loads(line) for line in whole["metrics.jsonl"].splitlines()]
    now = lines(folder)
    assert now[:2] == before[:2]
    # W2 moves first, by the new rate, and the architecture's loss is that of W2 thereafter.
    assert now[2]["losses"]["w2"] == before[2]["losses"]["w2"]
    assert now[2]["losses"]["arch"] != before[2]["losses"]["arch"]
    entries = read_changes(folder)
    assert [(e["phase"], e["round"], e["key"], e["old"], e["new"]) for e in entries] == [
        ("search", 2, "search.weights.lr", 0.025, 0.05),
        ("search", 2, "search.architecture.lr", 0.01, 0.02),
    ]
    result = json.loads((folder / "result.json").read_text())
    assert [entry["key"] for entry in result["changed"]] == [e["key"] for e in entries]
    assert "Changed after round 2 of search: search.weights.lr 0.025 → 0.05" in (
        runs.printed.getvalue()
    )


def test_settings_that_decide_no_numbers_leave_the_run_the_same(runs, whole, tmp_path):
    folder = tmp_path / "run"
    runs.start(folder, die_after=3)
    changes = {"search.checkpointing": True, "search.gradient_terms_every": 4}
    runs.resume(folder, checkpoint_keep_every=2, detect_collapse=True, **changes)
    found = outcome(folder)
    kept = [{**line, "gradient_terms": None} for line in lines(folder)]
    before = [json.loads(line) for line in whole["metrics.jsonl"].splitlines()]
    assert kept == [{**line, "gradient_terms": None} for line in before]
    assert found["result.json"] == whole["result.json"]  # nothing in it is said to have changed
    assert len(read_changes(folder)) == 4


def test_a_changed_run_is_killed_and_resumed_bit_for_bit(runs, tmp_path):
    change = {"evaluation.weights.lr": 0.1, "search.weights.grad_clip": None}
    for name in ("whole", "run"):
        runs.start(tmp_path / name, die_after=3)
    runs.resume(tmp_path / "whole", **change)
    runs.resume(tmp_path / "run", **change, die_after=1)
    runs.resume(tmp_path / "run", die_after=4)
    runs.resume(tmp_path / "run", **change)  # the same command again changes nothing
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    assert len(read_changes(tmp_path / "run")) == 2


@pytest.fixture
def nan_in_a_batch(monkeypatch):
    """The fourth batch of the training half has a pixel that is no number."""
    batch = Batches.batch

    def poisoned(self, index):
        found, labels = batch(self, index)
        if len(self._images) == 40 and index == 3:
            found[0, 0, 0, 0] = float("nan")
        return found, labels

    monkeypatch.setattr(Batches, "batch", poisoned)


@pytest.mark.filterwarnings("ignore::lfmcw_app.errors.NumbersWarning")
@pytest.mark.parametrize("policy", ["skip", "rollback"])
@pytest.mark.parametrize("edits", [False, True], ids=["by an option", "by an edit"])
def test_a_run_that_met_a_nan_can_be_finished(runs, tmp_path, nan_in_a_batch, policy, edits):
    folder = tmp_path / "run"
    with pytest.raises(InputError, match="Round 4, problem 'w2'"):
        runs.start(folder)
    with pytest.raises(InputError, match="Round 4, problem 'w2'"):  # again
        runs.resume(folder)
    if edits:
        config = folder / "config.yaml"
        config.write_text(
            config.read_text().replace("on_nonfinite: stop", f"on_nonfinite: {policy}")
        )
        result = runs.resume(folder)
    else:
        result = runs.resume(folder, on_nonfinite=policy)
    assert len(lines(folder)) == 15
    (change,) = result["changed"]
    assert change == {
        "phase": "search", "round": 2, "key": "on_nonfinite", "old": "stop", "new": policy,
    }  # fmt: skip


@pytest.mark.filterwarnings("ignore::lfmcw_app.errors.NumbersWarning")
def test_a_rollback_keeps_the_new_rates(runs, tmp_path, nan_in_a_batch):
    """The checkpoint that it returns to was written under the old ones."""
    folder = tmp_path / "run"
    runs.start(folder, die_after=3)
    runs.resume(folder, on_nonfinite="rollback", **{"search.architecture.lr": 0.5}, die_after=4)
    assert rates(folder / "search.pt", "arch") == [0.5]


def test_an_edit_of_what_may_not_change_is_refused(runs, tmp_path):
    folder = tmp_path / "run"
    runs.start(folder, die_after=3)
    config = folder / "config.yaml"
    config.write_text(config.read_text().replace("batch_size: 8", "batch_size: 9"))
    with pytest.raises(
        InputError, match=r"search\.batch_size 8 → 9.*Settings that can: on_nonfinite"
    ):
        runs.resume(folder)
    assert not (folder / CHANGES).exists()


def test_a_complete_run_can_train_longer(runs, whole, tmp_path):
    folder = tmp_path / "run"
    runs.start(folder)
    result = runs.resume(folder, **{"evaluation.epochs": 5})
    training = [line["round"] for line in lines(folder) if line["phase"] == "training"]
    assert training == list(range(1, 16))
    assert result["changed"][0] == {
        "phase": "training", "round": 9, "key": "evaluation.epochs", "old": 3, "new": 5,
    }  # fmt: skip
    assert json.loads((folder / "result.json").read_text()) == result
    assert lines(folder)[:15] == [json.loads(line) for line in whole["metrics.jsonl"].splitlines()]


def test_a_result_is_gone_while_the_training_is_longer(runs, tmp_path):
    folder = tmp_path / "run"
    runs.start(folder)
    runs.resume(folder, **{"evaluation.epochs": 5}, die_after=2)
    assert not (folder / "result.json").exists()
    runs.resume(folder)
    assert (folder / "result.json").exists()


def test_a_search_can_be_longer_until_it_has_ended(runs, tmp_path):
    folder = tmp_path / "run"
    runs.start(folder, die_after=3)
    runs.resume(folder, **{"search.steps": 8}, die_after=7)
    assert [line["round"] for line in lines(folder)] == [*range(1, 9), 1]
    # It died before the training had a checkpoint.
    runs.resume(folder, die_after=4)
    for key, value in (("search.steps", 9), ("search.weights.lr", 0.1)):
        with pytest.raises(InputError, match=f"has ended its search, so {key}"):
            runs.resume(folder, **{key: value})


def test_a_phase_does_not_end_before_where_it_stands(runs, tmp_path):
    folder = tmp_path / "run"
    runs.start(folder, die_after=5)
    before = (folder / "config.yaml").read_bytes()
    with pytest.raises(
        InputError, match="search has already made 4 rounds, so it cannot have only 3"
    ):
        runs.resume(folder, **{"search.steps": 3})
    assert (folder / "config.yaml").read_bytes() == before
    assert not (folder / CHANGES).exists()
    runs.resume(folder, **{"search.steps": 4})  # just where it stands
    assert len(lines(folder)) == 4 + 9


def test_a_damaged_record_of_changes_is_an_error(runs, tmp_path):
    folder = tmp_path / "run"
    runs.start(folder, die_after=3)
    (folder / CHANGES).write_text('{"key": "seed"}\n')
    with pytest.raises(InputError, match=r"changes\.jsonl is damaged"):
        runs.resume(folder)


def test_a_folder_of_an_earlier_version_can_change_too(runs, tmp_path):
    """It does not know with which recipe it began; its checkpoints do."""
    folder = tmp_path / "run"
    runs.start(folder, die_after=3)
    environment = json.loads((folder / "environment.json").read_text())
    del environment["recipe"]
    (folder / "environment.json").write_text(json.dumps(environment))
    runs.resume(folder, **{"search.weights.lr": 0.05}, die_after=1)
    runs.resume(folder)
    assert len(lines(folder)) == 15


def test_a_phase_whose_state_is_lost_is_done_again(runs, tmp_path):
    """Where weights themselves are lost no setting helps, and the message says what does."""
    folder = tmp_path / "run"
    runs.start(folder, die_after=3)
    state = mlo.load_checkpoint(folder / "search.pt")
    state["optimizer"]["problems"]["w2"]["module"]["network.stem.0.weight"].fill_(float("nan"))
    mlo.save_checkpoint(state, folder / "search.pt")
    with pytest.raises(InputError, match=r"delete search\*\.pt in .*--set search\.weights\.lr="):
        runs.resume(folder)
    for checkpoint in folder.glob("search*.pt"):
        checkpoint.unlink()
    runs.resume(folder, **{"search.weights.lr": 0.02})
    assert len(lines(folder)) == 15
