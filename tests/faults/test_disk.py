"""A full disk and a folder that turns read-only: warned of, survived while they last, an error
where they do not end.
"""

from __future__ import annotations

import subprocess

import pytest
from interrupted_runs import outcome

import mlo
from lfmcw_app import run_folder
from lfmcw_app.errors import InputError
from lfmcw_app.run_folder import RunFolder


@pytest.fixture
def disk(tmp_path):
    """A small disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder],
        capture_output=True,
        text=True,
        check=False,
    )
    if made.returncode:
        pytest.skip(f"no file system can be mounted here ({made.stderr.strip()}); needs root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


class Full:
    """No space is left."""

    words = "No space left on device"

    def __init__(self, folder):
        self.ballast = folder.parent / "ballast"

    def begin(self):
        with self.ballast.open("wb", buffering=0) as file:
            for size in (1 << 16, 1):
                try:
                    while True:
                        file.write(b"x" * size)
                except OSError:
                    continue

    def end(self):
        self.ballast.unlink()


class ReadOnly:
    """The folder is read-only, also for root."""

    words = "Read-only file system"

    def __init__(self, folder):
        self.folder = folder

    def begin(self):
        subprocess.run(["mount", "--bind", self.folder, self.folder], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", self.folder], check=True)

    def end(self):
        subprocess.run(["umount", self.folder], check=True)


@pytest.fixture
def between(monkeypatch):
    """Has a fault begin before one line of metrics and end before another."""

    def install(fault, first, last=None):
        log, count = RunFolder.log, 0

        def logging(self, entry):
            nonlocal count
            count += 1
            if count == first:
                fault.begin()
            if count == last:
                fault.end()
            log(self, entry)

        monkeypatch.setattr(RunFolder, "log", logging)

    return install


@pytest.mark.parametrize("kind", [Full, ReadOnly])
def test_a_fault_that_passes_costs_nothing_but_warnings(runs, whole, disk, between, kind):
    folder = disk / "run"
    between(kind(folder), 3, 6)
    with pytest.warns(
        mlo.CheckpointWarning, match=f"round 4 of search cannot be written.*{kind.words}"
    ):
        runs.start(folder)
    assert outcome(folder) == whole


@pytest.mark.parametrize("kind", [Full, ReadOnly])
@pytest.mark.parametrize(
    ("first", "resumes_from"), [(3, 2), (11, 3)], ids=["in the search", "in the training"]
)
@pytest.mark.filterwarnings("ignore::mlo.CheckpointWarning")
def test_a_fault_that_stays_stops_the_run(runs, whole, disk, between, kind, first, resumes_from):
    """It stops the run where its state is needed, and the run can be resumed afterwards."""
    folder = disk / "run"
    fault = kind(folder)
    between(fault, first)
    with pytest.raises(
        InputError, match=f"cannot be written.*{kind.words}.*the last checkpoint is kept.*--resume"
    ):
        runs.start(folder)
    phase = "search" if first < 7 else "training"
    assert mlo.load_checkpoint(folder / f"{phase}.pt")["optimizer"]["round"] == resumes_from
    fault.end()
    runs.resume(folder)
    assert outcome(folder) == whole
    assert list(folder.glob(".*.part")) == []


def test_a_long_round_ends_with_a_checkpoint_that_is_not_due(runs, monkeypatch, tmp_path, whole):
    """And leads to the same run: the best checkpoint is chosen by those that are due."""
    saved, save = [], RunFolder.save

    def noted(self, phase, optimizer, standing, **options):
        saved.append((phase, optimizer.round))
        return save(self, phase, optimizer, standing, **options)

    monkeypatch.setattr(RunFolder, "save", noted)
    monkeypatch.setattr("lfmcw_app.phase.SAVE_AFTER", 0.0)
    folder = tmp_path / "run"
    runs.start(folder)
    rounds = [number for phase, number in saved if phase == "search"]
    assert rounds == list(range(1, rounds[-1] + 1)) and len(rounds) > 3
    assert outcome(folder) == whole


@pytest.mark.filterwarnings("ignore::mlo.CheckpointWarning")
def test_a_run_gives_up_after_several_failed_checkpoints(runs, monkeypatch, tmp_path):
    """A run gives up after so many checkpoints in a row that could not be written."""

    def full(self, state, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mlo.CheckpointStore, "save", full)
    monkeypatch.setattr(run_folder, "FAILED_SAVES", 2)
    with pytest.raises(InputError, match=r"round 4 of search cannot be written.*2 in a row"):
        runs.start(tmp_path / "run")


def test_a_genotype_that_cannot_be_written_is_written_later(runs, monkeypatch, tmp_path, whole):
    """A genotype that cannot be written is an error, and is written later."""
    write = RunFolder.write

    def full(self, name, text):
        if name != "genotype.json":
            return write(self, name, text)
        with self.writing(name):
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "write", full)
        with pytest.raises(
            InputError, match=r"genotype\.json cannot be written.*Nothing that was saved is lost"
        ):
            runs.start(tmp_path / "run")
    runs.resume(tmp_path / "run")
    assert outcome(tmp_path / "run") == whole
