"""The kinds of faults of the campaign: what is done to runs, and how each must end."""

from __future__ import annotations

import io
import json
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from crash_points import die, disk_is_full, not_allowed
from data_faults import DATA_KINDS
from forked_runs import Runs, ended
from number_faults import NUMBER_KINDS
from process_faults import PROCESS_KINDS
from system_faults import SYSTEM_KINDS
from trials import REFUSED, Kind, Trial, numbers, resumed, said

import mlo

ANSWER = 30.0
"""Seconds that SIGTERM may take: a round is given up after eight, and the machine may be busy."""

# ------------------------------ kills


def killed_before_changes(
    runs: Runs, changes: int, seconds: float, most: int, rng: random.Random
) -> Iterator[Trial]:
    """SIGKILL before each change of a file that the run makes."""
    for at in numbers(changes, most, rng):
        path = runs.folder / f"killed-{at}"
        code = runs.struck(path, at, die, lasting=False)
        yield resumed(runs, path, f"before change {at}", said(code, -signal.SIGKILL, 0))


def killed_at_random(
    runs: Runs, changes: int, seconds: float, most: int, rng: random.Random
) -> Iterator[Trial]:
    """Chains of SIGKILLs and SIGTERMs at random moments, with damage in between."""
    for number in range(min(most, 40)):
        path, trace, unclear = runs.folder / f"chain-{number}", [], ""
        window = seconds / 2
        for _ in range(rng.randrange(1, 6)):
            pid = runs.started(runs.body(path))
            kind = signal.SIGTERM if rng.random() < 0.2 else signal.SIGKILL
            try:
                code = ended(pid, rng.uniform(0.0, window))
                break  # it was complete before
            except TimeoutError:
                os.kill(pid, kind)
            try:
                code = ended(pid, ANSWER)
            except TimeoutError:
                os.kill(pid, signal.SIGKILL)
                ended(pid)
                unclear = "SIGTERM was not answered"
                break
            # SIGTERM before the run has begun ends it as any process.
            unclear = unclear or said(code, 0, -signal.SIGKILL, -signal.SIGTERM)
            trace.append(kind.name)
            if rng.random() < 1 / 3:
                trace.append(_damage(path, rng))
        yield resumed(runs, path, ", ".join(trace), unclear)


def _damage(folder: Path, rng: random.Random) -> str:
    """Does one thing to a folder that a run must survive; returns what."""
    found = [folder / f"{name}.pt" for name in ("search", "training")]
    # One that has another before it: where the only one is lost, the error is the right end.
    checkpoints = [
        path for path in found if path.exists() and path.with_suffix(".previous.pt").exists()
    ]
    kind = rng.choice(["cut", "flipped", "gone", "half a line", "leftover"])
    if not folder.exists():
        return "nothing"
    if kind == "half a line":
        # A complete run writes no more, so that nothing cuts its log.
        if not (folder / "metrics.jsonl").exists() or (folder / "result.json").exists():
            return "nothing"
        with (folder / "metrics.jsonl").open("ab") as file:
            file.write(b'{"phase": "sea')
    elif kind == "leftover":
        if not (folder / "config.yaml").exists():
            return "nothing"
        (folder / f".search.pt.{rng.randrange(10**6)}.part").write_bytes(b"PK half a checkpoint")
    elif not checkpoints:
        return "nothing"
    else:
        path = rng.choice(checkpoints)
        content = bytearray(path.read_bytes())
        if kind == "gone":
            path.unlink()
        elif kind == "cut":
            path.write_bytes(content[: rng.randrange(len(content))])
        else:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            path.write_bytes(content)
    return kind


# ------------------------------ disks


def refused_changes(strike: Callable[[], None], bound: int, *, lasting: bool) -> Kind:
    """Changes that the system refuses.

    Args:
        strike: raises the system's error.
        bound: trials at most.
        lasting: whether all later changes fail too.
    """

    def refused(
        runs: Runs, changes: int, seconds: float, most: int, rng: random.Random
    ) -> Iterator[Trial]:
        for at in numbers(changes, min(most, bound), rng):
            path = runs.folder / f"{strike.__name__}-{lasting}-{at}"
            code = runs.struck(path, at, strike, lasting=lasting)
            yield resumed(runs, path, f"at change {at}", said(code, 0, REFUSED))

    return refused


def files_too_large(
    runs: Runs, changes: int, seconds: float, most: int, rng: random.Random
) -> Iterator[Trial]:
    """Writes that fail in the middle of a file, as those of a full disk and of a quota do."""
    for number in range(min(most, 40)):
        path, limit = runs.folder / f"limit-{number}", int(10 ** rng.uniform(0.0, 5.5))

        def body(path: Path = path, limit: int = limit) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # the log is no part of the run
            os.dup2(1, 2)
            runs.body(path)()

        code = ended(runs.started(body))
        yield resumed(runs, path, f"beyond {limit} bytes", said(code, 0, REFUSED))


def folder_gone(
    runs: Runs, changes: int, seconds: float, most: int, rng: random.Random
) -> Iterator[Trial]:
    """The folder is moved away while the run writes, and put back afterwards."""
    for at in numbers(changes, min(most, 20), rng):
        path, away = runs.folder / f"moved-{at}", runs.folder / f"away-{at}"

        def move(path: Path = path, away: Path = away) -> None:
            if path.exists() and not away.exists():
                path.rename(away)

        code = runs.struck(path, at, move, lasting=False)
        if away.exists():
            shutil.rmtree(path, ignore_errors=True)  # what was made in its place
            away.rename(path)
        yield resumed(runs, path, f"at change {at}", said(code, 0, REFUSED))


# ------------------------------ what others do to files


def logs_damaged(
    runs: Runs, changes: int, seconds: float, most: int, rng: random.Random
) -> Iterator[Trial]:
    """metrics.jsonl is cut, deleted or overwritten in a run: it still ends, with its own result."""
    whole = json.loads((runs.folder / "whole" / "result.json").read_text())
    for number in range(min(most, 20)):
        path = runs.folder / f"log-{number}"
        runs.struck(path, rng.randrange(changes // 3, changes), die, lasting=False)
        file = path / "metrics.jsonl"
        what = rng.choice(["cut", "gone", "zeros", "text"])
        if file.exists():
            content = file.read_bytes()
            cut = rng.randrange(len(content) + 1)
            if what == "gone":
                file.unlink()
            elif what == "cut":
                file.write_bytes(content[:cut])
            else:
                other = b"\0" if what == "zeros" else b"x"
                file.write_bytes(content[:cut] + other * (len(content) - cut))
        code = runs.completed(path)
        result = path / "result.json"
        same = result.exists() and json.loads(result.read_text()) == whole
        yield Trial(
            what=what,
            path=path,
            lost="" if same else "the result",
            unclear=said(code, 0),
        )


EDITS: tuple[Any, ...] = (
    None, -1, -3, 0, 10**9, 10**20, 1e308, "x", "", [], [[]], {}, True, "\0", "é" * 5000,
)  # fmt: skip


def _edited(tree: Any, rng: random.Random) -> Any:
    """A copy of nested plain data with one entry changed, removed or added."""
    tree = json.loads(json.dumps(tree))
    within = tree
    while True:
        keys = list(within) if isinstance(within, dict) else list(range(len(within)))
        key = rng.choice(keys)
        inner = within[key]
        if isinstance(inner, (dict, list)) and inner and rng.random() < 0.8:
            within = inner
            continue
        if rng.random() < 0.2:
            del within[key]
        else:
            within[key] = rng.choice(EDITS)
        return tree


def recipes_edited(
    runs: Runs, changes: int, seconds: float, most: int, rng: random.Random
) -> Iterator[Trial]:
    """config.yaml of a stopped run is edited: the run resumes, or the edit is refused in words."""
    from lfmcw_app.plain_yaml import parse_yaml

    stopped = runs.folder / "stopped"
    shutil.rmtree(stopped, ignore_errors=True)
    runs.struck(stopped, changes // 2, die, lasting=False)
    config = parse_yaml((stopped / "config.yaml").read_text("utf-8"))
    for number in range(min(most, 60)):
        path = runs.folder / f"recipe-{number}"
        shutil.copytree(stopped, path)
        text = json.dumps(_edited(config, rng), ensure_ascii=rng.random() < 0.5)
        (path / "config.yaml").write_text(text, "utf-8", "replace")
        # A run that became very long is asked to stop, which it answers.
        pid = runs.started(runs.body(path))
        try:
            code = ended(pid, 3 * seconds)
        except TimeoutError:
            os.kill(pid, signal.SIGTERM)
            code = ended(pid)
        yield Trial(what=text, path=path, unclear=said(code, 0, REFUSED))


def checkpoints_edited(
    runs: Runs, changes: int, seconds: float, most: int, rng: random.Random
) -> Iterator[Trial]:
    """An entry of search.pt is changed, with a right checksum: refused in words, or resumed."""
    stopped = runs.folder / "stopped"
    shutil.rmtree(stopped, ignore_errors=True)
    runs.struck(stopped, changes // 2, die, lasting=False)
    places = [path for path in stopped.glob("*.pt") if "." not in path.stem]
    for number in range(min(most, 60)):
        path = runs.folder / f"checkpoint-{number}"
        shutil.copytree(stopped, path)
        file = path / rng.choice(places).name
        state = mlo.load_checkpoint(file)
        what = _edit_tensors(state, rng)
        for other in path.glob(f"{file.stem}.*.pt"):  # else the one before takes its place
            other.unlink()
        mlo.save_checkpoint(state, file)
        code = runs.completed(path)
        yield Trial(what=what, path=path, unclear=said(code, 0, REFUSED))


def _edit_tensors(state: dict[str, Any], rng: random.Random) -> str:
    """Changes one entry of a checkpoint in place; returns its path."""
    within: Any = state
    path = ""
    while True:
        keys = list(within) if isinstance(within, dict) else list(range(len(within)))
        key = rng.choice(keys)
        path += f"/{key}"
        inner = within[key]
        if isinstance(inner, (dict, list)) and inner and rng.random() < 0.9:
            within = inner
            continue
        if rng.random() < 0.2:
            del within[key]
        else:
            within[key] = rng.choice(EDITS)
        return path


def reports_of_edited_folders(
    runs: Runs, changes: int, seconds: float, most: int, rng: random.Random
) -> Iterator[Trial]:
    """A file of a complete run is edited: the report is made, or refused in words."""
    from lfmcw_app.commands.report import report

    whole = runs.folder / "whole"
    names = [path.name for path in whole.iterdir() if path.suffix in (".json", ".jsonl", ".png")]
    for number in range(min(most, 100)):
        path = runs.folder / f"report-{number}"
        shutil.copytree(whole, path)
        file = path / rng.choice(names)
        what = f"{file.name} {_edit_file(file, rng)}"

        def body(path: Path = path) -> None:
            with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
                report([path])

        yield Trial(what=what, path=path, unclear=said(ended(runs.started(body)), 0, REFUSED))


def _edit_file(file: Path, rng: random.Random) -> str:
    content = file.read_bytes()
    if file.suffix == ".png" or rng.random() < 0.3:
        at = rng.randrange(len(content))
        file.write_bytes(content[:at] + bytes(rng.randrange(256) for _ in range(8)))
        return f"cut at {at}"
    lines = file.read_text("utf-8").splitlines() if file.suffix == ".jsonl" else [content.decode()]
    index = rng.randrange(len(lines))
    lines[index] = json.dumps(_edited(json.loads(lines[index]), rng), ensure_ascii=False)
    file.write_text("\n".join(lines) + "\n", "utf-8", "surrogatepass")
    return lines[index]


# ------------------------------ clocks


def clocks_that_jump(
    runs: Runs, changes: int, seconds: float, most: int, rng: random.Random
) -> Iterator[Trial]:
    """The time of day jumps by years, to and fro, in a run."""
    for number in range(min(most, 5)):
        path, seed = runs.folder / f"clock-{number}", rng.random()

        def body(path: Path = path, seed: float = seed) -> None:
            own, real, real_ns = random.Random(seed), time.time, time.time_ns
            years = 365.25 * 24 * 3600

            class Jumping(datetime):
                @classmethod
                def now(cls, tz: Any = None) -> datetime:
                    return datetime.now(tz) + timedelta(days=own.uniform(-3650, 3650))

            time.time = lambda: real() + own.uniform(-10, 10) * years
            time.time_ns = lambda: real_ns() + int(own.uniform(-10, 10) * years * 1e9)
            import lfmcw_app.provenance
            import lfmcw_app.run_folder

            lfmcw_app.provenance.datetime = Jumping
            lfmcw_app.run_folder.datetime = Jumping
            runs.body(path)()

        code = ended(runs.started(body))
        yield resumed(runs, path, f"seed {seed}", said(code, 0))


KINDS: dict[str, Kind] = {
    "killed before a change of a file": killed_before_changes,
    "killed at random moments, with damage": killed_at_random,
    "disk full at one change": refused_changes(disk_is_full, 10**6, lasting=False),
    "disk full from a change on": refused_changes(disk_is_full, 10**6, lasting=True),
    "permission refused at one change": refused_changes(not_allowed, 30, lasting=False),
    "permission refused from a change on": refused_changes(not_allowed, 30, lasting=True),
    **SYSTEM_KINDS,
    "writes that fail in the middle": files_too_large,
    "folder moved away": folder_gone,
    "log damaged": logs_damaged,
    "recipe edited": recipes_edited,
    "checkpoint edited": checkpoints_edited,
    "report of an edited folder": reports_of_edited_folders,
    "clock that jumps": clocks_that_jump,
    **DATA_KINDS,
    **NUMBER_KINDS,
    **PROCESS_KINDS,
}
