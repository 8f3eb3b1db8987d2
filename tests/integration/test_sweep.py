"""Runs on launchers: a failed one resumes from where it stands and is reported, the others are not
touched.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from concurrent.futures import wait
from pathlib import Path

import pytest
from started_processes import PATIENCE, started, wait_for

from lfmcw_app.run_files import LOG
from lfmcw_app.sweep import LocalProcesses, RayTasks, SubmititJobs, sweep

# A run in miniature: it counts its starts in the folder, and does in each what the folder's name
# says.
RUN = """
import os, pathlib, signal, sys
folder = pathlib.Path(sys.argv[1])
starts = len(list(folder.glob("start-*")))
(folder / f"start-{starts}").touch()
kind = folder.name
print("start", starts, kind)
if kind == "wrong":
    sys.exit(2)
if kind == "broken" or (kind == "flaky" and starts == 0):
    sys.exit(1)
if kind == "killed" and starts == 0:
    os.kill(os.getpid(), signal.SIGKILL)
if kind == "stopped" and starts == 0:
    sys.exit(0)
(folder / "result.json").write_text("{}")
"""


def command(folder: Path) -> list[str]:
    return [sys.executable, "-c", RUN, str(folder)]


def outcomes(launcher, root: Path, *kinds: str, retries: int = 2):
    folders = [root / kind for kind in kinds]
    for folder in folders:
        folder.mkdir(parents=True)
    with launcher:
        return {
            outcome.folder.name: outcome
            for outcome in sweep(folders, command, launcher, retries=retries)
        }


def check(found, root: Path):
    """Every kind of failure, each beside a run that is well."""
    assert found["good"].failure is None
    assert found["good"].tries == 1
    for kind in ("flaky", "killed", "stopped"):
        assert (found[kind].failure, found[kind].tries) == (None, 2), kind
        assert (root / kind / "result.json").exists()
    assert found["broken"].tries == 3
    assert f"exit code 1; see {root / 'broken' / LOG}" in found["broken"].failure
    assert found["wrong"].tries == 1
    assert "exit code 2" in found["wrong"].failure
    assert (root / "broken" / LOG).read_text().splitlines() == [
        f"start {start} broken" for start in range(3)
    ]


KINDS = ("good", "flaky", "killed", "stopped", "broken", "wrong")


@pytest.mark.parametrize("jobs", [1, 3])
def test_processes_of_this_machine(jobs, tmp_path):
    check(outcomes(LocalProcesses(jobs), tmp_path, *KINDS), tmp_path)


def test_a_pipe_in_place_of_a_log_fails_its_run_alone(tmp_path):
    folders = [tmp_path / "piped", tmp_path / "good"]
    for folder in folders:
        folder.mkdir()
    os.mkfifo(folders[0] / LOG)
    with LocalProcesses(1) as launcher:
        found = {one.folder.name: one for one in sweep(folders, command, launcher, retries=1)}
    assert "it is a pipe, a socket or a device" in found["piped"].failure
    assert found["good"].failure is None


@pytest.mark.slow
def test_jobs_of_submitit(tmp_path):
    """On submitit's own stand-in for SLURM."""
    pytest.importorskip("submitit")
    launcher = SubmititJobs(3, tmp_path / "submitit", {"timeout_min": 15}, cluster="local")
    check(outcomes(launcher, tmp_path, *KINDS), tmp_path)


@pytest.mark.slow
def test_tasks_of_ray(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    check(outcomes(RayTasks({"num_cpus": 1}), tmp_path, *KINDS), tmp_path)


def test_a_lost_worker_is_a_failure_of_its_run_only(tmp_path):
    class Losing(LocalProcesses):
        lost = False

        def _run(self, command, log):
            if log.parent.name == "good" and not self.lost:
                self.lost = True
                raise ConnectionError("the node went away")
            return super()._run(command, log)

    found = outcomes(Losing(1), tmp_path / "retried", "good", "flaky")
    assert {kind: (outcome.failure, outcome.tries) for kind, outcome in found.items()} == {
        "good": (None, 2),
        "flaky": (None, 2),
    }
    found = outcomes(Losing(1), tmp_path / "given-up", "good", retries=0)
    assert "ConnectionError: the node went away" in found["good"].failure


def test_what_still_runs_is_stopped_at_the_end(tmp_path):
    sleeper = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]
    with LocalProcesses(1) as launcher:
        running, waiting = (
            launcher.submit(sleeper, tmp_path / f"{index}.txt") for index in range(2)
        )
        said = tmp_path / "0.txt"
        wait_for(lambda: said.exists() and said.read_text())
    assert wait([running], timeout=PATIENCE).done
    assert running.result() == -signal.SIGTERM
    assert waiting.cancelled() or isinstance(waiting.exception(), InterruptedError)


@pytest.mark.slow
def test_a_table_that_is_asked_to_stop_stops_its_runs(tmp_path):
    settings = [
        "search.channels=4", "search.steps=100000", "data.search_images=200",
        "data.train_images=60", "data.test_images=50",
    ]  # fmt: skip
    arguments = [
        "table2",
        "digits",
        "--seeds=1",
        "--threads=1",
        f"--out={tmp_path / 't'}",
        f"--runs={tmp_path / 'runs'}",
    ]
    program = [sys.executable, "-m", "lfmcw_app.table"]
    command = [*program, *arguments, *(f"--set={setting}" for setting in settings)]
    with started(command, stdout=subprocess.PIPE, text=True) as process:
        wait_for(lambda: list((tmp_path / "runs").glob("*/metrics.jsonl")), process)
        children = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
        ).stdout.split()
        assert len(children) == 1
        process.terminate()
        assert process.wait(PATIENCE) == 143
        with pytest.raises(ProcessLookupError):
            os.kill(int(children[0]), 0)
