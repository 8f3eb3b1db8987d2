"""Faults of several processes: one hangs, `torchrun` is killed, another number of them resumes."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from forked_runs import Runs
from started_processes import PATIENCE, has_lines, started, wait_for
from trials import Kind, Trial

SHORT = 10.0
"""Seconds that processes wait for one that hangs; in runs of users thirty minutes."""

ENVIRONMENT = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}


@contextmanager
def several(
    runs: Runs, path: Path, count: int, options: Sequence[str], patience: float | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A run of so many processes in a folder, with the recipe and other options."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    program = [str(Path(__file__).with_name("run_of_campaign.py")), str(path)]
    waits = [] if patience is None else ["--patience", str(patience)]
    command = [*launcher, f"--nproc-per-node={count}", *program, *waits, "--device=cpu", *options]
    with started(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        yield process


def beginning(runs: Runs, path: Path, **changes: object) -> list[str]:
    """Options that begin the recipe's run."""
    settings = {**runs.settings, **{key.replace("__", "."): v for key, v in changes.items()}}
    given = [f"--set={key}={value}" for key, value in settings.items()]
    return ["digits", "--preset=smoke", f"--out={path}", *given]


def endless(runs: Runs, path: Path) -> list[str]:
    """Options that begin a run whose search does not end."""
    return beginning(runs, path, search__steps=100_000)


def workers(process: subprocess.Popen[str]) -> list[int]:
    """The processes that `torchrun` has started, in the order of their numbers."""
    found = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False
    )
    return sorted(map(int, found.stdout.split()))


def hanging(
    runs: Runs, changes: int, seconds: float, most: int, rng: random.Random
) -> Iterator[Trial]:
    """One of two processes stops to answer: the other says after its time-out what happened."""
    for number in range(min(most, 2)):
        path, words = runs.folder / f"hangs-{number}", "has waited"
        with several(runs, path, 2, endless(runs, path), SHORT) as process:
            wait_for(has_lines(path / "metrics.jsonl", 6), process)
            victim = workers(process)[number]
            os.kill(victim, signal.SIGSTOP)
            assert process.stdout is not None
            printed = []
            for line in process.stdout:
                printed.append(line)
                if words in " ".join("".join(printed).split()):
                    break
            os.kill(victim, signal.SIGKILL)  # torchrun gives it half a minute
            printed.append(process.communicate(timeout=PATIENCE)[0])
        told = " ".join("".join(printed).split())
        unclear = "" if words in told else f"not said: {words}: {told[-400:]}"
        yield Trial(what=f"process {number}", path=path, unclear=unclear, lost=_repeats(path))


def launcher_killed(
    runs: Runs, changes: int, seconds: float, most: int, rng: random.Random
) -> Iterator[Trial]:
    """`torchrun` is killed: its processes save their state and end, and do not hold the folder."""
    for number in range(min(most, 2)):
        path = runs.folder / f"launcher-{number}"
        with several(runs, path, 2, endless(runs, path)) as process:
            wait_for(has_lines(path / "metrics.jsonl", 4 + 3 * number), process)
            process.kill()
            assert process.stdout is not None
            told = " ".join(process.stdout.read().split())  # which ends when all have ended
        unclear = "" if "torchrun has ended" in told else f"not said: {told[-400:]}"
        lost = _repeats(path) or ("" if (path / "search.pt").exists() else "the state")
        yield Trial(what="killed", path=path, unclear=unclear, lost=lost)


def other_numbers(
    runs: Runs, changes: int, seconds: float, most: int, rng: random.Random
) -> Iterator[Trial]:
    """A run of one or two processes is stopped and resumed by another number of them."""
    for number, (first, then) in enumerate([(2, 1), (1, 2), (2, 4)][:most]):
        path = runs.folder / f"number-{number}"
        with several(runs, path, first, beginning(runs, path)) as process:
            wait_for(has_lines(path / "metrics.jsonl", 2), process)
            process.terminate()
            process.communicate(timeout=PATIENCE)
        if (path / "result.json").exists():  # it was quicker
            yield Trial(what=f"{first} → {then}, complete before", path=path)
            continue
        with several(runs, path, then, ["--resume", str(path)]) as process:
            told = " ".join(process.communicate(timeout=PATIENCE)[0].split())
        unclear = f"exit code {process.returncode}: {told[-400:]}" if process.returncode else ""
        if f"processes {first} → {then}" not in told:
            unclear = unclear or f"not said: the number of processes: {told[:400]}"
        whole = (runs.folder / "whole" / "metrics.jsonl").read_text().count("\n")
        lines = (path / "metrics.jsonl").read_text().count("\n")
        lost = _repeats(path) or ("" if lines == whole else f"{lines} lines in place of {whole}")
        yield Trial(what=f"{first} → {then}", path=path, unclear=unclear, lost=lost)


def _repeats(path: Path) -> str:
    """What is wrong with the rounds of a log: each phase has each of them once, in order."""
    seen: dict[str, int] = {}
    for line in (path / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        if entry["round"] != seen.get(entry["phase"], 0) + 1:
            return f"round {entry['round']} of {entry['phase']} stands at the wrong place"
        seen[entry["phase"]] = entry["round"]
    return ""


PROCESS_KINDS: dict[str, Kind] = {
    "process of torchrun that hangs": hanging,
    "torchrun killed": launcher_killed,
    "another number of processes": other_numbers,
}
