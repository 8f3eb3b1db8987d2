"""Runs of several processes: one is killed, all are asked to stop; a single process resumes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from started_processes import PATIENCE, wait_for
from started_processes import started as started_process

SETTINGS = {
    "search.method": "darts", "search.order": "first", "search.channels": 4, "search.nodes": 2,
    "search.steps": 100_000, "search.batch_size": 8, "checkpoint_every": 2,
    "data.search_images": 80, "data.train_images": 32, "data.test_images": 50,
    "evaluation.channels": 4, "evaluation.epochs": 1, "evaluation.batch_size": 16,
}  # fmt: skip
ENVIRONMENT = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
STREAMS = {
    "env": ENVIRONMENT, "stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True,
}  # fmt: skip


@pytest.fixture
def started(tmp_path):
    """A search of two processes that would never end, after its third checkpoint; the launcher, and
    the run folder.
    """
    folder = tmp_path / "run"
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "lfmcw_app.run",
    ]
    options = ["digits", "--device=cpu", "--threads=1", "--out", str(folder)]
    settings = [f"--set={key}={value}" for key, value in SETTINGS.items()]
    with started_process([*command, *options, *settings], **STREAMS) as process:
        wait_for(lambda: lines(folder) >= 6, process)
        yield process, folder


def lines(folder: Path) -> int:
    return (
        len((folder / "metrics.jsonl").read_text().splitlines())
        if (folder / "metrics.jsonl").exists()
        else 0
    )


def workers(process: subprocess.Popen) -> list[int]:
    found = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False
    ).stdout
    return [int(number) for number in found.split()]


def resumed(folder: Path) -> int:
    """Rounds of the search after a single process resumed it for a while."""
    before = lines(folder)
    command = [sys.executable, "-m", "lfmcw_app.run", "--resume", folder, "--threads=1"]
    with started_process(command, **STREAMS) as single:
        wait_for(lambda: lines(folder) >= before + 3, single)
        single.terminate()
        assert single.wait(PATIENCE) == 0, single.communicate()[1]
    rounds = [
        json.loads(line)["round"] for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]
    assert rounds == list(range(1, len(rounds) + 1))
    return len(rounds)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1], ids=["the one that writes", "the other"])
def test_a_killed_process_ends_all_and_a_single_one_resumes(started, victim):
    process, folder = started
    pids = workers(process)
    assert len(pids) == 2
    os.kill(sorted(pids)[victim], signal.SIGKILL)
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert "SIGKILL" in errors or "Signal 9" in errors
    assert resumed(folder) > 6


@pytest.mark.slow
def test_all_processes_stop_after_the_same_round_when_asked_to(started):
    process, folder = started
    pids = workers(process)
    process.terminate()
    process.communicate(timeout=PATIENCE)
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    stopped_after = lines(folder)
    assert (folder / "search.pt").exists()
    # Not a round is lost: the state was saved at the last one.
    assert resumed(folder) >= stopped_after + 3
