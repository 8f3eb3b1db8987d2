"""Workers, which carry out one run after another: the same numbers as by a process for each run,
failures of one run that leave the others alone, and tables that share runs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import torch
from started_processes import PATIENCE, finished, started, wait_for
from test_table import SHORT, rows
from tiny_runs import TINY

import mlo
from lfmcw_app.arms import TABLES, arm_recipe
from lfmcw_app.data import load_dataset
from lfmcw_app.data_checks import fitted
from lfmcw_app.run_files import LOG
from lfmcw_app.sweep import Workers, resume_command, sweep
from lfmcw_app.table_files import run_folder

SETTINGS = [f"{key}={value}" for key, value in {**TINY, **SHORT, "search.order": "first"}.items()]


def folders(root, seeds=2):
    """Run folders of a table: of LFM-CW and of the search without it, seed by seed."""
    digits = load_dataset("digits")
    made = []
    for seed in range(seeds):
        for arm in TABLES["table2"].values():
            recipe = arm_recipe(arm, "digits", None, None, SETTINGS, seed, space=None, order=None)
            made.append(run_folder(root, fitted(recipe, digits), digits))
    return made


def carried_out(paths):
    """Outcomes by folder of runs by a worker."""
    command = partial(resume_command, data=Path("data"), device="cpu", threads=1)
    with Workers(1) as launcher:
        return {found.folder: found for found in sweep(paths, command, launcher, retries=1)}


def numbers(folder):
    """All that is a function of recipe and seed, the weights of the last checkpoints among it."""
    files = ("metrics.jsonl", "genotype.json", "result.json", "samples.png")
    found = {name: (folder / name).read_bytes() for name in files if (folder / name).exists()}
    for phase in ("search", "training"):
        for key, value in leaves(mlo.load_checkpoint(folder / f"{phase}.pt")["optimizer"]):
            # Python's and numpy's generators, which no run draws from, begin anywhere.
            if not key.startswith((".random.python", ".random.numpy")):
                tensor = isinstance(value, torch.Tensor)
                found[f"{phase}{key}"] = value.numpy().tobytes() if tensor else value
    return found


def leaves(tree, above=""):
    """Dotted key → what is neither a mapping nor a list."""
    if isinstance(tree, dict | list | tuple):
        inner = tree.items() if isinstance(tree, dict) else enumerate(tree)
        for key, value in inner:
            yield from leaves(value, f"{above}.{key}")
    else:
        yield above, tree


@pytest.mark.slow
def test_workers_and_processes_compute_the_same_numbers(tmp_path):
    """A worker's fourth run, LFM-CW's, has the bits of the run in a process of its own."""
    by_worker, by_process = folders(tmp_path / "worker"), folders(tmp_path / "process")
    found = carried_out(by_worker)
    assert all(outcome.failure is None for outcome in found.values())
    mine, other = by_worker[-1], by_process[-1]
    resumed = finished(resume_command(other, data=Path("data"), device="cpu", threads=1))
    assert resumed.returncode == 0, resumed.stderr
    expected, found = numbers(other), numbers(mine)
    assert len(expected) > 100
    assert {key for key in expected if found[key] != expected[key]} == set()
    assert set(found) == set(expected)
    assert "test error" in (mine / LOG).read_text()


RUN = """
import os, pathlib, signal, sys
folder = pathlib.Path(sys.argv[1])
starts = len(list(folder.glob("start-*")))
(folder / f"start-{starts}").touch()
print("start", starts, folder.name, flush=True)
print("process", os.getpid(), file=sys.stderr)
if folder.name == "broken":
    raise ValueError("a bug")
if folder.name == "killed" and starts == 0:
    os.kill(os.getpid(), signal.SIGKILL)
os.write(1, b"written to the descriptor\\n")
(folder / "result.json").write_text("{}")
"""


def processes(log):
    return {line for line in log.read_text().splitlines() if line.startswith("process")}


@pytest.mark.slow
def test_a_run_that_fails_leaves_the_others_alone(tmp_path, monkeypatch):
    (tmp_path / "a_run.py").write_text(RUN)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    paths = [tmp_path / name for name in ("first", "broken", "killed", "second")]
    for path in paths:
        path.mkdir()

    def command(path):
        return [sys.executable, "-m", "a_run", str(path)]

    with Workers(1) as launcher:
        found = {
            outcome.folder.name: outcome for outcome in sweep(paths, command, launcher, retries=1)
        }
    assert {name: outcome.tries for name, outcome in found.items()} == {
        "first": 1,
        "broken": 2,
        "killed": 2,
        "second": 1,
    }
    assert [name for name, outcome in found.items() if outcome.failure] == ["broken"]
    assert "exit code 1" in found["broken"].failure
    logs = {path.name: (path / LOG).read_text() for path in paths}
    assert "ValueError: a bug" in logs["broken"]
    assert logs["first"].splitlines()[0] == "start 0 first"
    assert logs["first"].endswith("written to the descriptor\n")
    # A worker carries on after a failure, and another takes its place when it is killed.
    of_one = processes(tmp_path / "first" / LOG)
    assert of_one < processes(tmp_path / "broken" / LOG)  # its second try came later
    assert of_one != processes(tmp_path / "second" / LOG)


PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


def table_command(root, *arguments):
    settings = [f"--set={setting}" for setting in SETTINGS]
    places = [f"--runs={root / 'runs'}", f"--out={root / 'table'}"]
    how = ["--launcher=workers", "--threads=1", "--keep=results"]
    command = [sys.executable, "-m", "lfmcw_app.table", "table2", "digits"]
    return [*command, *places, *how, *settings, *arguments]


@pytest.mark.slow
def test_two_tables_share_their_runs(tmp_path):
    """Two commands at once: every run is made by one of them, and both have the whole table."""
    command = table_command(tmp_path, "--seeds=2")
    with ExitStack() as stack:
        both = [stack.enter_context(started(command, **PIPES)) for _ in range(2)]
        for process in both:
            printed, errors = process.communicate(timeout=PATIENCE)
            assert process.returncode == 0, errors
            assert printed.count("% test error") >= 4
    assert len(rows(tmp_path / "table")) == 4
    made = [path.read_text() for path in (tmp_path / "runs").glob("*/log.txt")]
    assert [text.count("search: 2 rounds to come") for text in made] == [1] * 4
    left = {path.name for path in next((tmp_path / "runs").glob("digits-darts-lfmcw*")).iterdir()}
    assert not left & {"search.pt", "network.pt", "metrics.jsonl", "samples", "report.html"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "SIGINT"]
)
def test_a_table_that_is_stopped_leaves_runs_to_resume(number, code, tmp_path):
    settings = ["--seeds=1", "--set=search.steps=100000"]
    command = table_command(tmp_path, *settings)
    with started(command, **PIPES, start_new_session=True) as process:
        wait_for(lambda: list((tmp_path / "runs").glob("*/metrics.jsonl")), process)
        os.killpg(process.pid, number)  # as a terminal and a scheduler do
        process.communicate(timeout=PATIENCE)
        assert process.returncode == code
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    [begun] = [path.parent for path in (tmp_path / "runs").glob("*/metrics.jsonl")]
    assert "the state is saved" in (begun / LOG).read_text()
    done = mlo.load_checkpoint(begun / "search.pt")["optimizer"]["round"]
    assert done == len((begun / "metrics.jsonl").read_text().splitlines()) > 0
    assert not (begun / "result.json").exists()
