"""Runs of the application in forked children, as a user starts and resumes them, and their ends."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import typer
from crash_points import striking

from lfmcw_app.commands.run import run
from lfmcw_app.output_files import leftovers

COMPARED = ("metrics.jsonl", "genotype.json", "result.json", "config.yaml")
TRACEBACK = 70
"""The exit code of a child that ended in an error of the program's own."""

PATIENCE = 3600.0
"""Seconds after which a child is given up; most take a few, on a machine of their own."""

SMALL = {
    "search.channels": 4,
    "search.nodes": 2,
    "search.steps": 4,
    "search.order": "first",
    "search.method": "darts",
    "search.batch_size": 8,
    "checkpoint_every": 1,
    "data.search_images": 80,
    "data.train_images": 60,
    "data.test_images": 50,
    "evaluation.channels": 2,
    "evaluation.epochs": 2,
    "evaluation.batch_size": 16,
}
WITH_GENERATOR = {
    **SMALL,
    "search.method": "lfmcw",
    "search.steps": 2,
    "search.generator.warmup_rounds": 2,
    "search.generator.quality": "snapshots",
    "evaluation.epochs": 1,
}


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Children with one recipe, in one folder.

    Attributes:
        folder: of the runs.
        settings: dotted key → value, beside the preset `smoke`.
    """

    folder: Path
    settings: dict[str, object]

    @property
    def log(self) -> Path:
        """What all children print."""
        return self.folder / "log.txt"

    def body(self, path: Path) -> Callable[[], None]:
        """Starts the run in a folder or, where there is one, resumes it."""

        def start_or_resume() -> None:
            if (path / "config.yaml").exists():
                run(resume=path, threads=1)
            else:
                self.begin(path)

        return start_or_resume

    def begin(self, path: Path, dataset: str = "digits", **changes: object) -> None:
        """Runs the recipe with changes of its settings, in this process; `__` is a dot."""
        given = {**self.settings, **{key.replace("__", "."): v for key, v in changes.items()}}
        settings = [f"{key}={json.dumps(value)}" for key, value in given.items()]
        run(dataset, preset="smoke", assign=settings, out=path, threads=1)

    def started(self, body: Callable[[], None]) -> int:
        """Starts a body in a child; returns the child's id."""
        sys.stdout.flush()
        pid = os.fork()
        if pid:
            return pid
        code = TRACEBACK
        try:
            descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            body()
            code = 0
        except typer.Exit as end:
            code = end.exit_code
        except BaseException:  # noqa: BLE001  # told, and must not reach the parent's code
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def told(self, body: Callable[[], None]) -> tuple[int, str]:
        """The exit code of a body in a child, and what it printed, in one line."""
        before = self.log.stat().st_size if self.log.exists() else 0
        code = ended(self.started(body))
        with self.log.open("rb") as file:
            file.seek(before)
            return code, " ".join(file.read().decode("utf-8", "replace").split())

    def struck(self, path: Path, at: int, strike: Callable[[], None], *, lasting: bool) -> int:
        """The exit code of a run that is struck at a change of its folder."""

        def body() -> None:
            with striking(path, at, strike, lasting=lasting):
                self.body(path)()

        return ended(self.started(body))

    def completed(self, path: Path) -> int:
        """The exit code of the command that a user repeats until the run is complete."""
        return ended(self.started(self.body(path)))

    def changes(self) -> int:
        """How many changes of its folder an undisturbed run makes; it is in `whole` then."""
        reader, writer = os.pipe()

        def body() -> None:
            with striking(self.folder / "whole") as strikes:
                self.body(self.folder / "whole")()
            os.write(writer, str(len(strikes.seen)).encode())

        code = ended(self.started(body))
        os.close(writer)
        count = os.read(reader, 64)
        os.close(reader)
        if code != 0:
            sys.exit(f"The undisturbed run failed:\n{self.log.read_text()}")
        return int(count)

    def difference(self, path: Path) -> str:
        """What of a complete run is otherwise than in the undisturbed one; empty if nothing is."""
        for name in COMPARED:
            one, other = (folder / name for folder in (path, self.folder / "whole"))
            if not one.exists() or one.read_bytes() != other.read_bytes():
                return name
        return ", ".join(left.name for left in leftovers(path))


def ended(pid: int, seconds: float = PATIENCE) -> int:
    """The exit code of a child, minus the signal that ended it.

    Raises:
        TimeoutError: if it does not end within so many seconds.
    """
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    raise TimeoutError
