"""Faults of what a run stands on: files and their modes, output, signals, the seed of hashes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from crash_points import die
from forked_runs import Runs, ended
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


OUTPUTS = ("a pipe nobody reads", "/dev/full", "ASCII", "closed")


def outputs_lost(
    runs: Runs, changes: int, seconds: float, most: int, rng: random.Random
) -> Iterator[Trial]:
    """What a resumed run prints cannot be written: it ends like the undisturbed one."""
    program = Path(__file__).with_name("run_of_campaign.py")
    for number, what in enumerate(OUTPUTS[: min(most, len(OUTPUTS))]):
        path = runs.folder / f"output-{number}"
        stopped_runs(runs, changes, rng).rename(path)
        reader, writer = os.pipe()
        os.close(reader)
        full = os.open("/dev/full", os.O_WRONLY)
        output = {"a pipe nobody reads": writer, "/dev/full": full}.get(what, subprocess.DEVNULL)
        command = [sys.executable, str(program), str(path)]
        if what == "closed":
            command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command]
        environment = {**os.environ, **({"PYTHONIOENCODING": "ascii"} if what == "ASCII" else {})}
        done = subprocess.run(
            command, env=environment, stdout=output, stderr=subprocess.DEVNULL, check=False
        )
        os.close(writer)
        os.close(full)
        expected = REFUSED if what == "/dev/full" else 0  # it says that output is missing
        lost, unclear = runs.difference(path), said(done.returncode, expected)
        yield Trial(what=what, path=path, lost=lost, unclear=unclear)


REPLACEMENTS = ("pipe", "folder", "/dev/zero", "/dev/full", "itself", "nothing", "empty", "a byte")


def files_replaced(
    runs: Runs, changes: int, seconds: float, most: int, rng: random.Random
) -> Iterator[Trial]:
    """Something else lies in the place of a file of a stopped run. It is resumed, and once more
    after the file is back. Nothing hangs.
    """
    for number in range(min(most, 60)):
        path = runs.folder / f"replaced-{number}"
        stopped_runs(runs, changes, rng).rename(path)
        file = rng.choice(sorted(file for file in path.iterdir() if file.is_file()))
        kind = rng.choice(REPLACEMENTS)
        kept = runs.folder / f"kept-{number}"
        shutil.copytree(path, kept)
        file.unlink()
        _put(file, kind)
        pid = runs.started(runs.body(path))
        try:
            unclear = said(ended(pid, 60 + 5 * seconds), 0, REFUSED)
        except TimeoutError:
            os.kill(pid, signal.SIGKILL)
            ended(pid)
            unclear = "it hangs"
        shutil.rmtree(path)
        kept.rename(path)
        yield resumed(runs, path, f"{file.name}: {kind}", unclear)


def _put(file: Path, kind: str) -> None:
    """Makes something of a kind in the place of a file."""
    if kind == "pipe":
        os.mkfifo(file)
    elif kind == "folder":
        file.mkdir()
    elif kind in ("empty", "a byte"):
        file.write_text("" if kind == "empty" else "x")
    else:
        file.symlink_to({"itself": file.name, "nothing": "/nowhere/at/all"}.get(kind, kind))


STARTS = 6.0
"""Seconds in which a process has imported all and resumes, more or less."""


def signals_of_terminals(
    runs: Runs, changes: int, seconds: float, most: int, rng: random.Random
) -> Iterator[Trial]:
    """A terminal is closed, or Ctrl-C is pressed twice, at any moments of a resumed run."""
    program = Path(__file__).with_name("run_of_campaign.py")
    for number in range(min(most, 20)):
        path = runs.folder / f"signals-{number}"
        stopped_runs(runs, changes, rng).rename(path)
        kinds = rng.choice([(signal.SIGHUP,), (signal.SIGINT, signal.SIGINT)])
        process = subprocess.Popen(
            [sys.executable, program, path], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        after = rng.uniform(STARTS / 2, STARTS + seconds)
        for kind in kinds:
            with suppress(subprocess.TimeoutExpired):
                process.wait(after)
            process.send_signal(kind)
            after = rng.uniform(0.0, 0.3)
        told = process.communicate()[1]
        # Before the run has begun, and after its end, signals end it as any process.
        code = process.returncode
        unclear = said(code, 0, 128 + kinds[0], -kinds[0])
        if b"Traceback" in told:
            unclear = told.decode("utf-8", "replace")[-300:]
        yield resumed(runs, path, ", ".join(kind.name for kind in kinds), unclear)


SYSTEM_KINDS: dict[str, Kind] = {
    "file or folder of another mode": modes,
    "another seed of hashes": hash_seeds,
    "output that is lost": outputs_lost,
    "something else in a file's place": files_replaced,
    "terminal closed, Ctrl-C twice": signals_of_terminals,
}
