"""The rounds of a phase. Interrupted phases are tried in tests/faults."""

from __future__ import annotations

import json
import signal
import warnings
from dataclasses import asdict

import pytest
import torch
from rich.console import Console

import mlo
from lfmcw_app import stopping
from lfmcw_app.errors import InputError
from lfmcw_app.phase import Phase, PhaseState, entry_of
from lfmcw_app.recipe_loading import load_recipe
from lfmcw_app.run_files import TIMINGS
from lfmcw_app.run_folder import RunFolder
from mlo import testing
from mlo.testing import bilevel_quadratic, identical, snapshot


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(tmp_path / "run", load_recipe("smoke"))


def begun(folder, optimizer, rounds=7):
    return Phase(
        folder, "search", optimizer, rounds=rounds, save_every=3, phases=("search", "training"),
        judged_by="x", console=Console(quiet=True), device=torch.device("cpu"),
    )  # fmt: skip


def run(phase, *, stop_after=None):
    """The numbers of the rounds that are run."""
    made = []
    for done in phase.rounds():
        made.append(done.record.round)
        if len(made) > 1 and made[-2] == stop_after:
            made.pop()  # the round before it is finished only when another is asked for
            break
    return made


def saved(folder, name="search"):
    return mlo.load_checkpoint(folder.path / f"{name}.pt")["optimizer"]["round"]


def test_every_round_is_run_and_logged(folder):
    called = []
    phase = begun(folder, bilevel_quadratic().optimizer("one_step"))
    for done in phase.rounds(lambda: called.append(1)):
        done.entry["more"] = done.record.round
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert [line["round"] for line in lines] == list(range(1, 8))
    assert [line["more"] for line in lines] == list(range(1, 8))
    assert {line["phase"] for line in lines} == {"search"}
    assert len(called) == 7


def test_checkpoints_are_due_at_intervals_and_at_the_end(folder):
    phase = begun(folder, bilevel_quadratic().optimizer("one_step"))
    found = []
    for done in phase.rounds():
        if done.is_due:
            found.append(done.record.round)
        if done.record.round == 6:
            assert saved(folder) == 3
    assert found == [3, 6, 7]
    assert saved(folder) == 7


def test_every_checkpoint_has_the_times_of_its_rounds(folder, monkeypatch):
    monkeypatch.setattr(stopping, "requested", lambda: signal.SIGINT)
    for _ in range(2):
        with pytest.raises(stopping.Stopped):
            run(begun(folder, bilevel_quadratic().optimizer("one_step")))
    lines = [json.loads(line) for line in (folder.path / TIMINGS).read_text().splitlines()]
    assert [line["rounds"] for line in lines] == [[1, 1], [2, 2]]


def test_a_phase_is_resumed_at_its_checkpoint(folder):
    whole = bilevel_quadratic().optimizer("one_step")
    list(whole.run(7))
    run(begun(folder, bilevel_quadratic().optimizer("one_step")), stop_after=5)
    again = RunFolder.open(folder.path)
    closed = bilevel_quadratic()
    with torch.no_grad():
        closed.problems[0].parameters["v"].add_(1.0)  # the checkpoint puts it back
    optimizer = closed.optimizer("one_step")
    assert run(begun(again, optimizer)) == [4, 5, 6, 7]
    assert identical(snapshot(optimizer)["problems"], snapshot(whole)["problems"])
    assert len(folder.metrics.read_text().splitlines()) == 7


def test_the_best_checkpoint_has_the_lowest_mean_loss(folder, monkeypatch):
    optimizer = bilevel_quadratic().optimizer("one_step")
    losses = iter([3.0, 3.0, 3.0, 1.0, 1.0, 1.0, 2.0])
    step = optimizer.step

    def with_a_known_loss():
        record = mlo.Record(round=step().round)
        loss = torch.tensor(next(losses))
        record.add("x", loss=loss, metrics={}, gradient_norm=torch.tensor(1.0))
        return record

    monkeypatch.setattr(optimizer, "step", with_a_known_loss)
    run(begun(folder, optimizer))
    assert saved(folder, "search.best") == 6
    assert saved(folder) == 7


def test_a_signal_stops_after_a_checkpoint(folder, monkeypatch):
    monkeypatch.setattr(stopping, "requested", lambda: signal.SIGTERM)
    phase = begun(folder, bilevel_quadratic().optimizer("one_step"))
    with pytest.raises(stopping.Stopped):
        run(phase)
    assert saved(folder) == 1
    assert stopping.saved() == "the end of round 1 of 7 of the search"


def test_where_a_resumed_phase_stands_is_known_at_once(folder):
    run(begun(folder, bilevel_quadratic().optimizer("one_step")), stop_after=5)
    stopping.record_saved("somewhere else")
    begun(RunFolder.open(folder.path), bilevel_quadratic().optimizer("one_step"))
    assert stopping.saved() == "the end of round 3 of 7 of the search"


def test_a_phase_that_resumes_has_its_own_learning_rates(folder, monkeypatch):
    """A change of the recipe says so; mlo's warning would say that those of the state hold."""
    run(begun(folder, bilevel_quadratic().optimizer("one_step")), stop_after=5)
    monkeypatch.setattr(testing, "LEARNING_RATE", 0.03)
    resumed = bilevel_quadratic().optimizer("one_step")
    with warnings.catch_warnings():
        warnings.simplefilter("error", mlo.CheckpointWarning)
        begun(RunFolder.open(folder.path), resumed)
    assert resumed.round == 3
    assert resumed.problems["w"].optimizers["w"].param_groups[0]["lr"] == 0.03


def test_parameters_that_are_lost_replace_no_checkpoint(folder):
    """A loss can be finite although a parameter is not: of tanh(inf), for one."""
    optimizer = bilevel_quadratic().optimizer("one_step")
    (parameter,) = optimizer.problems["x"].parameters.values()

    def lose_numbers() -> None:
        for done in begun(folder, optimizer).rounds():
            if done.record.round == 6:
                parameter.data.fill_(torch.inf)

    with pytest.raises(InputError, match=r"Round 6 of search: x\..* not finite.*not saved"):
        lose_numbers()
    assert saved(folder) == 3


def test_an_entry_is_plain_data_without_a_clock():
    optimizer = bilevel_quadratic().optimizer("cg")
    entry = entry_of(optimizer.step())
    assert json.loads(json.dumps(entry)) == entry
    assert set(entry) == {"round", "losses", "metrics", "gradient_norms", "solves"}
    kept = {"engine", "iterations", "residual", "converged", "failed"}
    assert set(entry["solves"]["w"]) == kept


def test_an_entry_names_what_was_skipped():
    record = mlo.Record(round=2)
    record.skipped["w"] = mlo.NonFiniteError("lost", problem="w", round=2, term="loss", data={})
    assert entry_of(record)["skipped"] == {"w": "loss"}


@pytest.mark.parametrize(
    "saved",
    [
        {"loss_sum": "x"},
        {"loss_count": 0.5},
        {"best": []},
        {"rollbacks": None},
        {"loss_sum": True},
        {"more": 1},
    ],
    ids=str,
)
def test_an_edited_phase_state_is_refused(saved):
    with pytest.raises(mlo.CheckpointError, match=rf"standing\.{next(iter(saved))} is"):
        PhaseState.read(saved)


def test_a_phase_state_is_read_as_it_was_saved():
    state = PhaseState(loss_sum=1.5, loss_count=3, best=0.25, rollbacks=1)
    assert PhaseState.read(asdict(state)) == state
    assert PhaseState.read({"best": None}) == PhaseState()
