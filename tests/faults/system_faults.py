"""Faults of what a run stands on: modes of files, the seed of Python's hashes."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from crash_points import die
from forked_runs import Runs
from modes_obeyed import with_mode
from trials import REFUSED, Kind, Trial, resumed, said

from lfmcw_app.commands.run import run

MODES = (0o000, 0o222, 0o333, 0o444, 0o555)
"""None of them lets both read and write."""


def stopped_runs(runs: Runs, changes: int, rng: random.Random) -> Path:
    """A run that was killed at some moment when it had a checkpoint."""
    stopped = runs.folder / "stopped"
    shutil.rmtree(stopped, ignore_errors=True)
    runs.struck(stopped, rng.randrange(changes // 2, changes), die, lasting=False)
    return stopped


def modes(
    runs: Runs, changes: int, seconds: float, most: int, rng: random.Random
) -> Iterator[Trial]:
    """A file or the folder of a stopped run has another mode; it is resumed, and once more after it
    has its mode again.
    """
    for number in range(min(most, 40)):
        path = runs.folder / f"mode-{number}"
        stopped_runs(runs, changes, rng).rename(path)
        harmed = rng.choice([path, *sorted(path.iterdir())])
        mode = rng.choice(MODES)
        what = f"{harmed.relative_to(runs.folder)} with mode {mode:03o}"

        def body(path: Path = path, harmed: Path = harmed, mode: int = mode) -> None:
            with with_mode(harmed, mode):
                run(resume=path, threads=1)

        code, told = runs.told(body)
        unclear = said(code, 0, REFUSED)
        if code == REFUSED and "ermission" not in told:
            unclear = f"no word of a permission: {told[-300:]}"
        if harmed.exists() and not os.access(harmed, os.R_OK):
            unclear = "the mode was not put back"
        yield resumed(runs, path, what, unclear)


def hash_seeds(
    runs: Runs, changes: int, seconds: float, most: int, rng: random.Random
) -> Iterator[Trial]:
    """A process with another seed of Python's hashes, and so another order of sets of names,
    resumes a run.
    """
    program = Path(__file__).with_name("run_of_campaign.py")
    for number in range(min(most, 3)):
        path, seed = runs.folder / f"hash-{number}", str(rng.randrange(1, 2**32))
        stopped_runs(runs, changes, rng).rename(path)
        done = subprocess.run(
            [sys.executable, program, path],
            env={**os.environ, "PYTHONHASHSEED": seed},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            check=False,
        )
        lost = runs.difference(path)
        unclear = said(done.returncode, 0)
        yield Trial(what=f"PYTHONHASHSEED={seed}", path=path, lost=lost, unclear=unclear)


SYSTEM_KINDS: dict[str, Kind] = {
    "file or folder of another mode": modes,
    "another seed of hashes": hash_seeds,
}
