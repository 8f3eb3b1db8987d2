"""A run folder: what is written when, and what of it is read again."""

from __future__ import annotations

import json
import os
import shutil
from itertools import count

import pytest
import torch
import yaml
from crash_points import disk_is_full, killed_at, striking
from modes_obeyed import with_mode
from torch import nn

import mlo
from lfmcw_app.errors import InputError
from lfmcw_app.metrics_log import MetricsLog
from lfmcw_app.numerics import described_numerics
from lfmcw_app.output_files import leftovers
from lfmcw_app.recipe_loading import load_recipe
from lfmcw_app.run_files import KEEP
from lfmcw_app.run_folder import DIAGNOSES, RunFolder
from mlo.testing import bilevel_quadratic

RECIPE = load_recipe("smoke")
PHASES = ("search", "training")


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(tmp_path / "run", RECIPE)


def full(*arguments, **options):
    raise OSError(28, "No space left on device")


def test_a_new_folder_holds_the_recipe_and_the_environment(folder):
    assert yaml.safe_load((folder.path / "config.yaml").read_text()) == yaml.safe_load(
        RECIPE.to_yaml()
    )
    environment = json.loads((folder.path / "environment.json").read_text())
    assert environment["mlo"] == mlo.__version__
    assert environment["numerics"] == described_numerics(RECIPE)
    assert RunFolder.open(folder.path).recipe == RECIPE


@pytest.mark.parametrize(
    ("name", "words"), [("config.yaml", "another run"), ("notes.txt", "something else")]
)
def test_a_folder_with_something_in_it_is_left_alone(tmp_path, name, words):
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match=f"holds {words}"):
        RunFolder.create(tmp_path, RECIPE)
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "holds no run"), ("search: [", "not valid YAML"), (b"\xff", "be read")],
)
def test_a_folder_without_a_run_is_refused(tmp_path, content, words):
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "config.yaml").write_bytes(data)
    with pytest.raises(InputError, match=words):
        RunFolder.open(tmp_path)


def test_a_folder_that_a_killed_writer_left_is_removed(tmp_path):
    """Such as that of `sample --out RUN/images`."""
    folder = RunFolder.create(tmp_path / "run", RECIPE)
    left = folder.path / ".images.4321.part"
    left.mkdir()
    (left / "0000.png").write_text("half")
    with folder.locked():
        assert not left.exists()


def begun(path):
    """What a user does after an interruption: the same command again, or --resume."""
    try:
        folder = RunFolder.create(path, RECIPE)
    except InputError:
        folder = RunFolder.open(path)
    with folder.locked():
        pass
    assert folder.recipe == RECIPE
    assert json.loads((path / "environment.json").read_text())["recipe"]["seed"] == RECIPE.seed
    assert not leftovers(path)


def test_a_kill_at_any_moment_of_its_making_is_mended(tmp_path):
    for number in count():
        path = tmp_path / f"run-{number}"
        if not killed_at(path, number, lambda path=path: RunFolder.create(path, RECIPE)):
            break
        begun(path)
    assert number > 5  # the folder, the lock, and two files with a name of their own until whole


def test_a_disk_full_at_any_moment_of_its_making_is_mended(tmp_path):
    with striking(tmp_path / "whole") as changes:
        RunFolder.create(tmp_path / "whole", RECIPE)
    refused = 0
    for number in range(len(changes.seen)):
        path = tmp_path / f"run-{number}"
        with striking(path, number, disk_is_full):
            try:
                RunFolder.create(path, RECIPE)
            except InputError:
                refused += 1
        begun(path)
    assert refused > 5  # a second attempt at the lock may succeed


def test_a_folder_that_is_gone_is_said_to_be_gone(folder):
    optimizer = bilevel_quadratic().optimizer("one_step")
    shutil.rmtree(folder.path)
    with pytest.warns(mlo.CheckpointWarning, match="is gone: it was moved or deleted"):
        folder.log({"round": 1})
    with pytest.raises(InputError, match=r"is gone: it was moved or deleted.*Put it back"):
        folder.save("search", optimizer, {}, must=True)
    with pytest.raises(InputError, match="is gone: it was moved or deleted"):
        folder.write("genotype.json", "{}")


def test_a_checkpoint_deleted_meanwhile_is_written_again(folder):
    optimizer = bilevel_quadratic().optimizer("one_step")
    folder.save("search", optimizer, {})
    (folder.path / "search.pt").unlink()
    assert folder.save("search", optimizer, {"best": 0.5})
    assert RunFolder.open(folder.path).restore("search", optimizer, PHASES) == {"best": 0.5}


def test_what_has_changed_since_a_run_began_is_known(folder):
    assert folder.changed_environment() == []
    file = folder.path / "environment.json"
    began = json.loads(file.read_text())
    file.write_text(json.dumps({**began, "torch": "1.0", "commit": None}))
    assert folder.changed_environment() == [f"torch '1.0' → {torch.__version__!r}"]
    file.write_text("[]")
    assert folder.changed_environment() == []


def test_only_one_process_runs_in_a_folder(folder):
    other = RunFolder.open(folder.path)
    with (
        folder.locked(),
        pytest.raises(InputError, match="Another process is running"),
        other.locked(),
    ):
        pass
    with other.locked():
        pass


def test_a_file_is_written_whole_or_not_at_all(folder, monkeypatch):
    folder.write("genotype.json", "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"genotype\.json cannot be written.*No space"):
        folder.write("genotype.json", "new")
    assert (folder.path / "genotype.json").read_text() == "old"


def test_lines_are_logged_and_passed_on(folder):
    heard = []
    folder.listeners.append(heard.append)
    for number in (1, 2):
        folder.log({"round": number})
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert lines == heard == [{"round": 1}, {"round": 2}]


def test_lines_that_cannot_be_written_wait(folder, monkeypatch):
    """Lines that cannot be written wait for the next checkpoint."""
    optimizer = bilevel_quadratic().optimizer("one_step")
    with monkeypatch.context() as patch:
        patch.setattr(MetricsLog, "write", full)
        with pytest.warns(mlo.CheckpointWarning, match="its lines wait in memory"):
            folder.log({"round": 1})
        folder.log({"round": 2})
    assert not folder.metrics.exists()
    assert folder.save("search", optimizer, {})
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    assert lines == [{"round": 1}, {"round": 2}]


def test_lines_since_the_checkpoint_are_dropped(folder):
    optimizer = bilevel_quadratic().optimizer("one_step")
    folder.log({"round": 1})
    folder.save("search", optimizer, {"best": 0.5})
    folder.log({"round": 2})
    again = RunFolder.open(folder.path)
    assert again.restore("search", optimizer, PHASES) == {"best": 0.5}
    assert folder.metrics.read_text() == '{"round": 1}\n'


class Normed(nn.Module):
    """A layer and a BatchNorm, which keeps running statistics or does not."""

    def __init__(self, *, tracks):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2, track_running_stats=tracks)

    def forward(self, x):
        return self.norm(self.layer(x))


def normed(*, tracks):
    module = Normed(tracks=tracks)
    problem = mlo.Problem(
        "w",
        module=module,
        optimizer=torch.optim.Adam(module.parameters()),
        loss=lambda w, batch: w(batch).sin().sum(),
        data=[torch.arange(12.0).view(4, 3).cos()],
    )
    return mlo.MultilevelOptimizer([problem])


@pytest.mark.parametrize("how", ["restore", "roll_back"])
def test_running_statistics_of_an_earlier_version_are_dropped(folder, how):
    """Its supernets kept them. The run continues as it would have, bit for bit."""
    old, new = normed(tracks=True), normed(tracks=False)
    old.step()
    folder.save("search", old, {})
    with pytest.warns(mlo.CheckpointWarning, match=r"These 3 tensors are dropped"):
        folder.restore("search", new, PHASES) if how == "restore" else folder.roll_back(
            "search", new
        )
    for optimizer in (old, new):
        optimizer.step()
    weights = dict(old.problems["w"].module.named_parameters())
    for name, weight in new.problems["w"].module.named_parameters():
        assert torch.equal(weight, weights[name])


def test_missing_statistics_are_refused(folder):
    """A derived network's are read by its tests."""
    folder.save("search", normed(tracks=False), {})
    with pytest.raises(mlo.CheckpointError, match=r"'norm.running_mean'.*differ in name or shape"):
        folder.restore("search", normed(tracks=True), PHASES)


def test_a_log_that_cannot_be_cut_is_cut_with_the_next_line(folder):
    optimizer = bilevel_quadratic().optimizer("one_step")
    folder.log({"round": 1})
    folder.save("search", optimizer, {})
    folder.log({"round": 2})
    again = RunFolder.open(folder.path)
    full = striking(folder.path, 0, disk_is_full)
    with pytest.warns(mlo.CheckpointWarning, match="tried again with the next line"), full:
        again.restore("search", optimizer, PHASES)
    again.log({"round": 3})
    assert folder.metrics.read_text() == '{"round": 1}\n{"round": 3}\n'


def test_a_phase_without_a_checkpoint_begins_anew(folder):
    optimizer = bilevel_quadratic().optimizer("one_step")
    assert folder.restore("search", optimizer, PHASES) == {}
    folder.save("training", optimizer, {})
    with pytest.raises(mlo.CheckpointError, match="none of 'search' before it"):
        RunFolder.open(folder.path).restore("search", optimizer, PHASES)


def test_a_checkpoint_of_another_recipe_is_refused(folder, tmp_path):
    optimizer = bilevel_quadratic().optimizer("one_step")
    folder.save("search", optimizer, {})
    other = RunFolder.create(tmp_path / "other", load_recipe("smoke", overrides={"seed": 3}))
    (folder.path / "search.pt").rename(other.path / "search.pt")
    with pytest.raises(mlo.CheckpointError, match="from a recipe that this run has never had"):
        other.restore("search", optimizer, PHASES)


@pytest.mark.parametrize("edited", [3, None, b"seed: 1", ["seed: 1"], torch.zeros(2)])
def test_a_recipe_that_is_no_text_is_refused(folder, edited):
    optimizer = bilevel_quadratic().optimizer("one_step")
    folder.save("search", optimizer, {})
    state = torch.load(folder.path / "search.pt", weights_only=True)
    assert isinstance(state["recipe"], str)
    torch.save({**state, "recipe": edited}, folder.path / "search.pt")
    with pytest.raises(mlo.CheckpointError, match="lacks entries, or they were edited"):
        RunFolder.open(folder.path).restore("search", optimizer, PHASES)


def test_a_checkpoint_that_must_be_written_is_an_error(folder, monkeypatch):
    optimizer = bilevel_quadratic().optimizer("one_step")
    monkeypatch.setattr(mlo.CheckpointStore, "save", full)
    with pytest.warns(mlo.CheckpointWarning, match="tries again at the next checkpoint"):
        assert not folder.save("search", optimizer, {})
    with pytest.raises(InputError, match=r"\(2 in a row\).*the last checkpoint is kept"):
        folder.save("search", optimizer, {}, must=True)


def test_an_optional_file_that_cannot_be_written_is_warned_of(folder):
    words = "The run continues without it"
    with pytest.warns(mlo.CheckpointWarning, match=words), folder.attempting("cells.png"):
        full()


def test_whatever_a_picture_fails_at_is_warned_of(folder):
    words = r"cells\.png cannot be made \(ZeroDivisionError: .*\)\. The run continues without it"
    with pytest.warns(mlo.CheckpointWarning, match=words), folder.attempting("cells.png"):
        1 / 0  # noqa: B018


def test_diagnoses_of_lost_numbers_are_few(folder):
    said = []
    for number in range(DIAGNOSES + 1):
        data = {"problem": "w", "round": number}
        error = mlo.NonFiniteError("lost", problem="w", round=number, term="loss", data=data)
        said.append(folder.save_diagnosis(error))
    assert len(list(folder.path.glob("nonfinite-*.pt"))) == DIAGNOSES
    assert "nonfinite-w-round-0.pt" in said[0]
    assert "no more are written" in said[-1]
    assert mlo.load_checkpoint(folder.path / "nonfinite-w-round-2.pt")["round"] == 2


def test_the_result_says_that_the_run_is_complete(folder):
    assert folder.result is None
    folder.write("result.json", '{"test_error_percent": 1.5}')
    assert folder.result == {"test_error_percent": 1.5}
    folder.write("result.json", "{")
    with pytest.raises(InputError, match=r"result\.json is damaged.*Delete it and resume"):
        assert folder.result
    with with_mode(folder.path / "result.json", 0), pytest.raises(PermissionError):
        assert folder.result  # it may be whole, and is not to be deleted


def fill(folder):
    """Files of every kind that a run writes, and one that it does not."""
    (folder.path / "samples").mkdir()
    names = (
        "search.pt", "search.previous.pt", "network.pt", "samples/real.png", "cells.svg",
        "cells.png", "samples.png", "report.html", "metrics.jsonl", "timings.jsonl",
        "genotype.json", "log.txt", "mine.txt",
    )  # fmt: skip
    for name in names:
        (folder.path / name).write_text("{}")


def names_of(folder):
    return {path.name for path in folder.path.rglob("*") if path.is_file()}


LEFT = {
    ".lock", "config.yaml", "environment.json", "genotype.json", "log.txt", "mine.txt",
    "result.json", "timings.jsonl",
}  # fmt: skip


@pytest.mark.parametrize(
    ("keep", "left"), [("results", LEFT), ("metrics", {*LEFT, "metrics.jsonl"})]
)
def test_a_complete_run_keeps_what_it_is_told_to(folder, keep, left):
    fill(folder)
    folder.keep = keep
    folder.write("result.json", "{}")
    folder.clear()
    assert names_of(folder) == left
    assert not folder.draws


def test_a_run_keeps_everything_unless_told_otherwise(folder):
    fill(folder)
    folder.write("result.json", "{}")
    before = names_of(folder)
    folder.clear()
    assert names_of(folder) == before
    assert folder.draws
    assert set(KEEP) == {"all", "metrics", "results"}


def test_a_run_without_a_result_keeps_its_checkpoints(folder):
    fill(folder)
    before = names_of(folder)
    folder.keep = "results"
    folder.clear()
    assert names_of(folder) == before


def test_a_file_that_cannot_be_removed_is_warned_of(folder, monkeypatch):
    (folder.path / "search.pt").touch()
    folder.keep = "results"
    folder.write("result.json", "{}")
    monkeypatch.setattr(type(folder.path), "unlink", full)
    with pytest.warns(mlo.CheckpointWarning, match=r"search\.pt cannot be removed \(No space left"):
        folder.clear()


def test_what_completed_a_run_stands_beside_what_began_it(folder):
    before = json.loads((folder.path / "environment.json").read_text())
    folder.record_completion({"device": "a GPU"})
    after = json.loads((folder.path / "environment.json").read_text())
    assert after == {**before, "completed": {"device": "a GPU"}}
    (folder.path / "environment.json").write_text("{")
    with pytest.warns(mlo.CheckpointWarning, match="What completed the run"):
        folder.record_completion({"device": "a GPU"})


def test_a_run_with_a_result_says_what_completed_it(folder, monkeypatch):
    """Whenever it is stopped: what completed it is written before the result."""
    write = RunFolder.write

    def stopped_before(self, name, text):
        if name == "result.json":
            raise KeyboardInterrupt
        write(self, name, text)

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write", stopped_before)
        with pytest.raises(KeyboardInterrupt):
            folder.complete("{}", {"commit": "abc"})
    assert folder.result is None
    began = json.loads((folder.path / "environment.json").read_text())
    assert began["completed"] == {"commit": "abc", "keep": "all"}
    folder.complete("{}", {"commit": "abc"})
    assert folder.result == {}


def test_a_run_that_was_stopped_in_its_clearing_is_cleared(folder):
    """By the next process that takes it up, whatever that one would keep."""
    fill(folder)
    folder.keep = "results"
    folder.complete("{}", {})
    again = RunFolder.open(folder.path)
    again.finish_clearing()
    assert names_of(folder) == LEFT


@pytest.mark.parametrize("edit", ["problems", "lower", "module"])
def test_a_state_of_another_shape_is_refused_in_words(folder, edit):
    optimizer = bilevel_quadratic().optimizer("one_step")
    folder.save("search", optimizer, {})
    file = folder.path / "search.pt"
    state = mlo.load_checkpoint(file)
    problems = state["optimizer"]["problems"]
    name = next(iter(problems))
    if edit == "problems":
        state["optimizer"]["problems"] = "x"
    elif edit == "lower":
        problems[name] = []
    else:
        problems[name]["module"] = None
    mlo.save_checkpoint(state, file)
    with pytest.raises(mlo.CheckpointError, match="It was edited"):
        RunFolder.open(folder.path).restore("search", optimizer, PHASES)


@pytest.mark.parametrize("completed", ['{"keep": "x"}', '{"keep": []}', "[]", "3", "null"])
def test_a_run_that_says_no_known_thing_to_keep_keeps_all(folder, completed):
    fill(folder)
    folder.write("result.json", "{}")
    before = names_of(folder)
    folder.write("environment.json", f'{{"completed": {completed}}}')
    folder.finish_clearing()
    assert names_of(folder) == before


@pytest.mark.parametrize(
    ("name", "make", "words"),
    [
        ("timings.jsonl", os.mkfifo, "a pipe, a socket or a device, where the run keeps a file"),
        ("metrics.jsonl", os.mkdir, "a folder, where the run keeps a file"),
        ("search.pt", os.mkdir, "a folder, where the run keeps a file"),
        ("samples", lambda path: path.touch(), "a file, where the run keeps a folder"),
    ],
)
def test_what_can_be_no_file_of_a_run_is_refused_at_once(folder, name, make, words):
    make(folder.path / name)
    with pytest.raises(InputError, match=f"{name} is {words}"), folder.locked():
        raise AssertionError
    (folder.path / name).rename(folder.path.parent / name)
    with folder.locked():
        pass


@pytest.mark.parametrize("kind", ["a run", "a folder", "a file"])
def test_only_a_run_is_said_to_be_resumable(kind, tmp_path):
    path = tmp_path / "out"
    if kind == "a file":
        path.write_text("")
    else:
        path.mkdir()
        (path / ("config.yaml" if kind == "a run" else "notes.txt")).write_text("")
    with pytest.raises(InputError, match="nothing there is overwritten") as refused:
        RunFolder.create(path, load_recipe("smoke"))
    assert ("--resume" in str(refused.value)) is (kind == "a run")
    assert ("is a file" in str(refused.value)) is (kind == "a file")
