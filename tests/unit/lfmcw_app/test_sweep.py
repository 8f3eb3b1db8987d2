"""Many runs on an engine for jobs: options, commands, retries."""

from __future__ import annotations

import sys
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
from filelock import FileLock

from lfmcw_app.errors import InputError
from lfmcw_app.run_files import LOG
from lfmcw_app.sweep import HELD, SubmititJobs, make_launcher, resume_command, run_command, sweep


class Jobs:
    """A launcher whose jobs end at once: name of the folder → the exit codes of its tries.

    The last one counts for all later tries; an exception loses the job. Code 0 leaves a result.
    """

    def __init__(self, ends):
        self.ends, self.started = ends, []

    def submit(self, command, log):
        folder = log.parent
        tries = sum(name == folder.name for name, _ in self.started)
        self.started.append((folder.name, command))
        end = self.ends[folder.name][min(tries, len(self.ends[folder.name]) - 1)]
        future = Future()
        if isinstance(end, Exception):
            future.set_exception(end)
            return future
        if end == 0:
            (folder / "result.json").touch()
        future.set_result(end)
        return future


def outcomes(root, ends, retries=2):
    jobs = Jobs(ends)
    for name in ends:
        (root / name).mkdir()
    found = sweep(
        [root / name for name in ends], lambda path: ["run", str(path)], jobs, retries=retries
    )
    return {outcome.folder.name: outcome for outcome in found}, jobs


def test_a_run_that_ends_well_is_not_tried_again(tmp_path):
    found, jobs = outcomes(tmp_path, {"good": [0]})
    assert (found["good"].tries, found["good"].failure) == (1, None)
    assert jobs.started == [("good", ["run", str(tmp_path / "good")])]


def test_a_failed_run_is_tried_again(tmp_path):
    found, _ = outcomes(tmp_path, {"flaky": [1, -9, 0], "broken": [1], "good": [0]})
    assert (found["flaky"].tries, found["flaky"].failure) == (3, None)
    assert found["broken"].tries == 3
    assert found["broken"].failure == f"exit code 1; see {tmp_path / 'broken' / LOG}"
    assert found["good"].tries == 1


def test_a_wrong_input_is_not_tried_again(tmp_path):
    found, _ = outcomes(tmp_path, {"wrong": [2]})
    assert found["wrong"].tries == 1
    assert "exit code 2" in found["wrong"].failure


def test_a_run_of_another_sweep_comes_last(tmp_path, monkeypatch):
    """It is refused while the other holds it, and carried out when that one has given it up."""
    lock, naps = FileLock(tmp_path / "held" / ".lock"), []

    def nap(seconds):
        naps.append(seconds)
        if len(naps) == 2:
            lock.release()

    monkeypatch.setattr(time, "sleep", nap)
    (tmp_path / "held").mkdir()
    lock.acquire()
    jobs = Jobs({"held": [HELD, 0], "good": [0]})
    (tmp_path / "good").mkdir()
    folders = [tmp_path / "held", tmp_path / "good"]
    found = list(sweep(folders, lambda path: ["run"], jobs, retries=0))
    assert [(outcome.folder.name, outcome.failure) for outcome in found] == [
        ("good", None),
        ("held", None),
    ]
    assert [name for name, _ in jobs.started] == ["held", "good", "held"]
    assert len(naps) == 2


class Elsewhere(Jobs):
    """Jobs that find their folder held; another process completes the run before they end."""

    def __init__(self, code):
        super().__init__({"run": [code]})

    def submit(self, command, log):
        (log.parent / "result.json").touch()
        return super().submit(command, log)


@pytest.mark.parametrize("code", [HELD, 2])
def test_a_run_that_another_sweep_completed_is_no_failure(tmp_path, code):
    """Its lock is free again when the refused one is looked at."""
    (tmp_path / "run").mkdir()
    jobs = Elsewhere(code)
    (found,) = sweep([tmp_path / "run"], lambda path: ["run"], jobs, retries=0)
    assert (found.tries, found.failure) == (1, None)
    assert len(jobs.started) == 1


def test_a_run_that_another_sweep_gave_up_is_carried_out(tmp_path):
    """It was held when it was tried, and is neither held nor complete when it is looked at."""
    found, jobs = outcomes(tmp_path, {"run": [HELD, 0]}, retries=0)
    assert found["run"].failure is None
    assert len(jobs.started) == 2


@pytest.mark.parametrize("kind", ["local", "workers"])
def test_what_another_sweep_has_completed_is_not_started(kind, tmp_path):
    (tmp_path / "result.json").write_text("{}")
    never = [sys.executable, "-m", "no_such_module"]
    with make_launcher(kind, jobs=1, folder=tmp_path, options={}) as launcher:
        assert launcher.submit(never, tmp_path / LOG).result(20) == 0
    assert not (tmp_path / LOG).exists()


@pytest.mark.parametrize(
    ("end", "words"),
    [(-15, "killed by signal 15"), (ConnectionError("gone"), "ConnectionError: gone")],
    ids=["killed", "lost"],
)
def test_a_failure_says_what_happened(tmp_path, end, words):
    found, _ = outcomes(tmp_path, {"run": [end]}, retries=0)
    assert words in found["run"].failure


def test_a_worker_returns_the_exit_code_and_keeps_the_output(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("before\n")
    code = "print('out'); import sys; print('err', file=sys.stderr); sys.exit(7)"
    assert run_command([sys.executable, "-c", code], str(log)) == 7
    assert set(log.read_text().split()) == {"before", "out", "err"}


def test_options_are_checked(tmp_path):
    for name in ("local", "workers"):
        with pytest.raises(InputError, match=f"{name} has no options"):
            make_launcher(name, jobs=1, folder=tmp_path, options={"num_gpus": 1})
    with pytest.raises(InputError, match="Did you mean 'ray'"):
        make_launcher("rai", jobs=1, folder=tmp_path, options={})
    pytest.importorskip("submitit")
    with pytest.raises(InputError, match="partition_of_slurm"):
        SubmititJobs(1, tmp_path, {"partition_of_slurm": "x"}, cluster="local")


def test_the_command_resumes_a_folder():
    command = resume_command(Path("runs/x"), data=Path("data"), device="cpu", threads=3)
    assert command[:4] == [sys.executable, "-m", "lfmcw_app.run", "--resume"]
    assert command[4:] == ["runs/x", "--data", "data", "--device", "cpu", "--threads", "3"]


def test_the_command_says_what_a_run_keeps():
    settings = {"data": Path("data"), "device": "cpu", "threads": 1}
    assert "--keep" not in resume_command(Path("runs/x"), **settings)
    command = resume_command(Path("runs/x"), **settings, keep="results")
    assert command[command.index("--keep") + 1] == "results"
