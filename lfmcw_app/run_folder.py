"""A run folder: what a run writes, where, and how an interrupted run finds its place again.

config.yaml        the resolved recipe
environment.json   versions and hardware
metrics.jsonl      one line per round of search and training, a function of recipe and seed alone
search.pt          last checkpoint of the search; training.pt: of the derived network's training.
                   Of both also .previous.pt (the one before), .best.pt and, if the recipe says so,
                   .round-N.pt (docs/checkpoints.md)
genotype.json      the derived cells; cells.png, cells.svg: their picture
nonfinite-*.pt     what is known of a loss or gradient that was not finite, for the first few
evaluated.json     in a folder of lfmcw_app.evaluate, the genotype that was given
samples.png        generated images, one row per class; samples/: smaller ones of the rounds in
                   between, and real ones
dataset.json       class names and sizes
tensorboard/       event files, with --tensorboard
timings.jsonl      time and memory of each problem's updates
report.html        all of it as one page (lfmcw_app.report)
.lock              held by the process that runs here
result.json        the test error; written last, so its presence means that the run is complete
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

import mlo
from lfmcw_app.errors import InputError
from lfmcw_app.recipe import Recipe, parse_yaml, validate_recipe

__all__ = ["EVALUATED", "REPORT", "RunFolder"]

EVALUATED = "evaluated.json"
"""Marks a folder of `lfmcw_app.evaluate`: the given genotype, which no search here found."""

LOCK, REPORT = ".lock", "report.html"

FAILED_SAVES = 10
"""A run stops after so many checkpoints in a row that could not be written: it keeps nothing."""

DIAGNOSES = 5
"""Diagnostic files of numbers that were lost, at most."""


class RunFolder:
    """The folder of one run.

    Lines of metrics and checkpoints that cannot be written (a full disk) are warned of and tried
    again at the next checkpoint; the lines wait in memory.

    Args:
        path: an existing folder with a `config.yaml`; see `create` and `open`.
        recipe: the recipe in it.

    Attributes:
        listeners: are called with each entry that is logged.
    """

    writes = True
    """Whether this process writes pictures and files into it."""

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path = path
        self.recipe = recipe
        self._pending: list[str] = []
        # Of metrics.jsonl, up to the last line that is known to be whole.
        self._metrics_bytes = 0
        # Whether the rounds that run now have their lines in metrics.jsonl already.
        self._repeats = False
        self._failed_saves = 0
        self._stores: dict[str, mlo.CheckpointStore] = {}
        self.listeners: list[Callable[[dict[str, Any]], None]] = []

    # ------------------------------ the folder

    @classmethod
    def create(cls, path: Path, recipe: Recipe) -> RunFolder:
        """Makes a new run folder.

        Raises:
            InputError: if the folder holds something already, or cannot be written.
        """
        folder = cls(path, recipe)
        try:
            folder._check_empty()
            path.mkdir(parents=True, exist_ok=True)
            with folder.locked():
                folder._check_empty()  # another process may have come first
                folder.write("config.yaml", recipe.to_yaml())
                folder.write("environment.json", json.dumps(_environment(), indent=1))
        except OSError as error:
            raise InputError(
                f"The run folder {path} cannot be written ({error}). Name another with --out."
            ) from None
        return folder

    def _check_empty(self) -> None:
        path = self.path
        if not path.exists():
            return
        if not path.is_dir() or any(entry.name != LOCK for entry in path.iterdir()):
            what = "another run" if (path / "config.yaml").exists() else "something else"
            raise InputError(
                f"--out {path} holds {what} already, and nothing there is overwritten. Name a new "
                f"folder, or go on with that run by --resume {path}."
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from running in this folder while the body runs.

        The system releases the lock of a process that dies.

        Raises:
            InputError: if another process holds it, or it cannot be written.
        """
        lock = FileLock(self.path / LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise InputError(
                f"Another process is running in {self.path}. Wait for it, stop it, or name another "
                "folder."
            ) from None
        except OSError as error:
            raise InputError(f"The run folder {self.path} cannot be written ({error}).") from None
        try:
            yield
        finally:
            lock.release()

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Opens an existing run folder.

        Raises:
            InputError: if there is no run in it.
        """
        config = path / "config.yaml"
        try:
            tree = parse_yaml(config.read_text("utf-8"))
        except FileNotFoundError:
            raise InputError(f"--resume {path}: there is no run in it (no config.yaml).") from None
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"--resume {path}: its config.yaml cannot be read ({error})."
            ) from None
        except ValueError:
            raise InputError(f"--resume {path}: its config.yaml is damaged.") from None
        return cls(path, validate_recipe(tree))

    # ------------------------------ files

    def write(self, name: str, text: str) -> None:
        """Writes a file so that it is there whole or not at all.

        Raises:
            InputError: if it cannot be written.
        """
        # A name that is replaced in one step shows the old file or the new one, at any moment.
        temporary = self.path / f".{name}.part"
        with self.writing(name):
            with temporary.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(self.path / name)

    @contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Turns a failure to write (a full or read-only disk, say) into a user's error."""
        try:
            yield
        except OSError as error:
            raise InputError(
                f"{what} cannot be written in {self.path} ({error.strerror or error}). Make room "
                "or give the permission, then go on with --resume: nothing that was saved is lost."
            ) from None

    def log(self, entry: dict[str, Any]) -> None:
        """Adds a line to metrics.jsonl, and passes it to the listeners.

        A line that cannot be written waits in memory for the next checkpoint.
        """
        self._pending.append(json.dumps(entry) + "\n")
        if len(self._pending) == 1:
            try:
                self._write_pending()
            except OSError as error:
                self._warn(
                    f"metrics.jsonl cannot be written ({error.strerror or error}); its lines wait "
                    "in memory."
                )
        for listener in self.listeners:
            listener(entry)

    @contextmanager
    def attempting(self, what: str) -> Iterator[None]:
        """Downgrades a failure to write an optional file to a warning."""
        try:
            yield
        except OSError as error:
            self._warn(
                f"{what} cannot be written in {self.path} ({error.strerror or error}); the run "
                "goes on without it."
            )

    def _write_pending(self, *, flush: bool = False) -> None:
        """Writes the lines that wait.

        After a failure the file may end in part of a line, which the next attempt removes.
        """
        # `_metrics_bytes` ends with the last whole line; repeated rounds only advance it.
        text = "".join(self._pending).encode()
        if text and not self._repeats:
            with self.metrics.open("ab") as file:
                if file.tell() > self._metrics_bytes:
                    file.truncate(self._metrics_bytes)
                file.write(text)
                file.flush()
        if flush and self.metrics.exists():
            with self.metrics.open("rb") as file:
                os.fsync(file.fileno())
        self._metrics_bytes += len(text)
        self._pending.clear()

    @staticmethod
    def _warn(message: str) -> None:
        warnings.warn(message, mlo.CheckpointWarning, stacklevel=3)

    def save_diagnosis(self, error: mlo.NonFiniteError) -> str:
        """Writes what is known of lost numbers, the first few times; returns where, in words."""
        if len(list(self.path.glob("nonfinite-*.pt"))) >= DIAGNOSES:
            return f"There are {DIAGNOSES} diagnostic files already; no more are written."
        name = f"nonfinite-{error.problem}-round-{error.round}.pt"
        try:
            mlo.save_checkpoint(error.data, self.path / name)
        except OSError as failure:
            return f"A diagnostic file cannot be written ({failure.strerror or failure})."
        return f"What is known of it is in {self.path / name} (mlo.load_checkpoint)."

    @property
    def samples(self) -> Path:
        """The folder of generated images through time."""
        return self.path / "samples"

    @property
    def metrics(self) -> Path:
        """The file of metrics."""
        return self.path / "metrics.jsonl"

    @property
    def result(self) -> dict[str, Any] | None:
        """The result, if the run is complete."""
        try:
            result: dict[str, Any] = json.loads((self.path / "result.json").read_text("utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.path / 'result.json'} is damaged ({error}). Delete it and resume: the "
                "result is computed again."
            ) from None
        return result

    # ------------------------------ checkpoints

    def checkpoints(self, phase: str) -> mlo.CheckpointStore:
        """The checkpoints of a phase."""
        return self._stores.setdefault(phase, mlo.CheckpointStore(self.path, phase))

    def save(
        self,
        phase: str,
        optimizer: mlo.MultilevelOptimizer,
        phase_state: dict[str, Any],
        *,
        must: bool = False,
        best: bool = False,
        keep_as: int | None = None,
    ) -> bool:
        """Writes the checkpoint of a phase, with the length that metrics.jsonl has now.

        Args:
            phase: which.
            optimizer: its state is saved.
            phase_state: what else the phase needs to resume; `restore` returns it.
            must: whether the run cannot do without this one.
            best: whether it is the best of the phase.
            keep_as: number under which a copy stays.

        Returns:
            Whether it was written; if not, there was a warning.

        Raises:
            InputError: if it could not be written and must be, or `FAILED_SAVES` in a row could
                not.
        """
        # The lines first: a checkpoint may not know of lines that are not on the disk.
        try:
            self._write_pending(flush=True)
            state = {
                "recipe": self.recipe.to_yaml(),
                "phase": phase,
                "metrics_bytes": self._metrics_bytes,
                "standing": phase_state,  # files of earlier versions have the key too
                "optimizer": optimizer.state_dict(),
            }
            self.checkpoints(phase).save(state, best=best, keep_as=keep_as)
        except OSError as error:
            self._failed_saves += 1
            what = (
                f"The checkpoint of round {optimizer.round} of {phase} cannot be written in "
                f"{self.path} ({error.strerror or error})"
            )
            if must or self._failed_saves >= FAILED_SAVES:
                often = f" ({self._failed_saves} in a row)" if self._failed_saves > 1 else ""
                raise InputError(
                    f"{what}{often}. The run stops, and the last checkpoint stands. Make room or "
                    "give the permission, then go on with --resume."
                ) from None
            self._warn(f"{what}. The run goes on, and tries again at the next one.")
            return False
        self._failed_saves = 0
        return True

    def restore(
        self, phase: str, optimizer: mlo.MultilevelOptimizer, phases: Sequence[str]
    ) -> dict[str, Any]:
        """Loads a phase's checkpoint, if there is one; drops metrics written since the latest.

        If the last one is damaged, the one before is loaded. Where a later phase has a checkpoint
        already, the rounds that are then computed again add no lines: metrics.jsonl has them.

        Args:
            phase: which.
            optimizer: what is restored.
            phases: all phases of the run, in their order.

        Returns:
            What `save` was given as `phase_state`; empty where there is no checkpoint.

        Raises:
            CheckpointError: if it is damaged or belongs to another run.
        """
        after = phases[phases.index(phase) + 1 :]
        later = [other for other in after if self.checkpoints(other).exists()]
        store = self.checkpoints(phase)
        if self.writes:
            store.remove_leftovers()  # a finished phase has no later save, which would do so
        state = store.load(partial(self._check, phase))
        self._repeats = bool(later)
        if state is None:
            if later:
                raise mlo.CheckpointError(
                    f"{self.path} has a checkpoint of {later[0]!r} but none of {phase!r} before it "
                    f"({phase}.pt). Put it back, or start again in a new folder."
                )
            self._go_to(self._metrics_bytes)  # where the phase before this one ended
            return {}
        optimizer.load_state_dict(state["optimizer"])
        self._go_to(state["metrics_bytes"])
        phase_state: dict[str, Any] = state.get("standing", {})
        return phase_state

    def roll_back(self, phase: str, optimizer: mlo.MultilevelOptimizer) -> dict[str, Any]:
        """Returns to the last checkpoint of a phase, with new batches and noise; drops later lines.

        Returns:
            What `save` was given as `phase_state`.

        Raises:
            CheckpointError: if there is none.
        """
        state = self.checkpoints(phase).load(partial(self._check, phase))
        if state is None:
            raise mlo.CheckpointError(
                f"There is no checkpoint of {phase!r} in {self.path} to go back to."
            )
        optimizer.roll_back(state["optimizer"])
        self._go_to(state["metrics_bytes"])
        phase_state: dict[str, Any] = state["standing"]
        return phase_state

    def _check(self, phase: str, state: dict[str, Any]) -> None:
        """Raises a CheckpointError unless a checkpoint is one of this phase of this run."""
        where = f"The checkpoint of {phase!r} in {self.path}"
        length = state.get("metrics_bytes")
        if not isinstance(length, int) or "optimizer" not in state:
            raise mlo.CheckpointError(
                f"{where} is not one of a run: it lacks entries. Use another folder."
            )
        # Keys that are new since it was written have their defaults.
        try:
            recipe = validate_recipe(parse_yaml(state["recipe"]))
        except (KeyError, ValueError):  # an InputError is a ValueError
            recipe = None
        if state.get("phase") != phase or recipe != self.recipe:
            raise mlo.CheckpointError(
                f"{where} ({phase}.pt) is from another recipe than the config.yaml beside it. "
                "Resume the run that it belongs to, or start again in a new folder."
            )
        there = self.metrics.stat().st_size if self.metrics.exists() else 0
        if there < length:
            raise mlo.CheckpointError(
                f"{self.metrics} is shorter ({there} bytes) than when the checkpoint was written "
                f"({length} bytes): it was cut or replaced. Start again in a new folder."
            )

    def _go_to(self, length: int) -> None:
        """Continues metrics.jsonl from a length.

        What follows that length is dropped, unless it belongs to later phases.
        """
        self._pending.clear()
        self._metrics_bytes = length
        if self.writes and self.metrics.exists() and not self._repeats:
            os.truncate(self.metrics, length)


def _environment() -> dict[str, Any]:
    return {
        "command": _command(),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "mlo": mlo.__version__,
        "platform": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _command() -> str:
    """The command line that started this process, as it can be typed again."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["python", "-m", spec.name] if spec is not None else [sys.argv[0]]
    return shlex.join([*program, *sys.argv[1:]])
