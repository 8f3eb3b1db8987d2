"""A run folder: how a run writes its files (run_files.py), and how it resumes."""

from __future__ import annotations

import json
import os
import platform
import re
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
from lfmcw_app.batchnorm import without_statistics
from lfmcw_app.bounded_files import read_object, text_of
from lfmcw_app.errors import HeldError, InputError, shown
from lfmcw_app.metrics_log import MetricsLog
from lfmcw_app.near_paths import near_runs
from lfmcw_app.numerics import described_numerics
from lfmcw_app.output_files import leftovers, remove, replacing
from lfmcw_app.plain_yaml import parse_yaml
from lfmcw_app.provenance import commit, device_kind
from lfmcw_app.recipe import Recipe
from lfmcw_app.recipe_loading import validate_recipe
from lfmcw_app.result_file import read_result
from lfmcw_app.resuming import (
    Change,
    change_lines,
    known_recipes,
    planned_changes,
    read_changes,
    with_declared_rates,
)
from lfmcw_app.run_files import (
    CHANGES,
    CONFIG,
    ENVIRONMENT,
    KEEP,
    LOCK,
    METRICS,
    RESULT,
    SAMPLES_FOLDER,
    TENSORBOARD,
)
from mlo.distributed import rank_and_size

__all__ = ["RunFolder"]

BEFORE_A_RUN = re.compile(rf"{re.escape(LOCK)}|\.config(\.yaml)?\.(\d+\.)?part(\.yaml)?")
"""What a run folder may hold without a recipe: the run was killed in its first moment."""

FILES = (".json", ".jsonl", ".pt", ".txt", ".yaml", ".png", ".svg", ".html")
FOLDERS = (SAMPLES_FOLDER, TENSORBOARD)
"""Endings of the files of a run, and names of its folders."""

DECIDES_BITS = ("commit", "mlo", "torch", "cpu", "gpu", "cpu_threads", "processes")
"""Entries of environment.json that affect the last bits of a run."""

GONE = "the folder is gone: it was moved or deleted"

FAILED_SAVES = 10
"""Number of failed checkpoints in a row that stop a run, because it saves nothing."""

DIAGNOSES = 5
"""Largest number of diagnostic files on lost numbers."""


class RunFolder:
    """The folder of one run.

    If metrics or checkpoints cannot be written (a full disk), there is a warning, and the next
    checkpoint tries again; the lines wait in memory.

    Args:
        path: an existing folder with a `config.yaml`; see `create` and `open`.
        recipe: the recipe in it.

    Attributes:
        listeners: are called with each entry that is logged.
        changes: settings that change at the next round; see `change` and `record_changes`.
        written_recipe: the recipe in config.yaml, which does not have these changes yet. keep: what
        is kept of the run when it is complete, a name in `KEEP`.
    """

    writes = True
    """Whether this process writes pictures and files into it."""

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path = path
        self.recipe = recipe
        self._log = MetricsLog(self.metrics, writes=self.writes)
        self._failed_saves = 0
        self._stores: dict[str, mlo.CheckpointStore] = {}
        self.listeners: list[Callable[[dict[str, Any]], None]] = []
        self.changes: tuple[Change, ...] = ()
        self.written_recipe = recipe
        self.keep = "all"

    # ------------------------------ the folder

    @classmethod
    def create(cls, path: Path, recipe: Recipe) -> RunFolder:
        """Makes a new run folder.

        Raises:
            InputError: if the folder is not empty, or cannot be written.
        """
        folder = cls(path, recipe)
        try:
            cls.check_free(folder.path)
            path.mkdir(parents=True, exist_ok=True)
            with folder.locked():
                cls.check_free(folder.path)  # another process may have come first
                # With this file there is a run, which can be resumed; without it there is none.
                folder._replace(CONFIG, recipe.to_yaml())
                folder._write_environment(recipe)
        except OSError as error:
            raise InputError(
                f"The run folder {path} cannot be written ({error}). Free some space or fix the "
                "permissions, then start again, or name another folder with --out."
            ) from None
        return folder

    def _write_environment(self, began: Recipe) -> None:
        """Writes the versions and the hardware, with the recipe that the run began with."""
        recipe = began.model_dump(mode="json", by_alias=True)
        found = {**_environment(), "numerics": described_numerics(began), "recipe": recipe}
        self.write(ENVIRONMENT, json.dumps(found, indent=1))

    def changed_environment(self) -> list[str]:
        """What has changed since the run began and may change last bits: "torch 2.8 → 2.9"."""
        try:
            began = read_object(self.path / ENVIRONMENT)
            known = {key: began[key] for key in DECIDES_BITS if began.get(key) is not None}
        except (OSError, ValueError):
            return []  # damaged or missing: nothing is known
        here = _environment()
        return [
            f"{key} {shown(before)} → {shown(here[key])}"
            for key, before in known.items()
            if here[key] != before
        ]

    @staticmethod
    def check_free(path: Path) -> None:
        """Checks that a new run can have a folder, before anything is read for it.

        Raises:
            InputError: if something is in it.
        """
        if not path.exists():
            return
        if not path.is_dir() or any(not BEFORE_A_RUN.fullmatch(e.name) for e in path.iterdir()):
            holds_run = os.path.isfile(path / CONFIG)
            again = shlex.quote(str(path))
            resume = f", or resume that run with --resume {again}" if holds_run else ""
            what = "already holds another run" if holds_run else "already holds something else"
            raise InputError(
                f"--out {path} {what if path.is_dir() else 'is a file'}, and nothing there is "
                f"overwritten. Name a new folder{resume}."
            )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from running in this folder while the body runs.

        The system releases the lock of a process that dies. Leftovers of killed writers are removed
        or completed.

        Raises:
            HeldError: if another process holds it.
            InputError: if it cannot be written.
        """
        lock = FileLock(self.path / LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise HeldError(
                f"Another process is running in {self.path}. Wait for it, stop it, or name another "
                "folder."
            ) from None
        except OSError as error:
            raise InputError(
                f"The run folder {self.path} cannot be written ({error}). Free some space or fix "
                "the permissions, then start again."
            ) from None
        try:
            self._check_places()
            self._tidy()
            yield
        finally:
            lock.release()

    def _check_places(self) -> None:
        """Refuses what can be no file of a run, before anything is computed: a pipe may hang it.

        Raises:
            InputError: naming it.
        """
        for path in sorted(self.path.iterdir()):
            what = ""
            if not (path.is_file() or path.is_dir()) and path.exists():
                what = "a pipe, a socket or a device"
            elif path.is_dir() and path.suffix in FILES:
                what = "a folder"
            elif path.is_file() and path.name in FOLDERS:
                what = "a file"
            if what:
                wanted = "folder" if path.name in FOLDERS else "file"
                raise InputError(
                    f"{path} is {what}, where the run keeps a {wanted}. Move it away, then resume."
                )

    def _tidy(self) -> None:
        """Removes leftovers of killed writers, and writes environment.json if it is missing."""
        for leftover in leftovers(self.path):
            with self.attempting(leftover.name):
                remove(leftover)
        begun = (self.path / CONFIG).exists()
        if self.writes and begun and not (self.path / ENVIRONMENT).exists():
            self._write_environment(known_recipes(self.path, self.written_recipe)[0])

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """Opens an existing run folder.

        Raises:
            InputError: if there is no run in it.
        """
        config = path / CONFIG
        try:
            text = text_of(config)
        except FileNotFoundError:
            stopped = path.is_dir() and any(BEFORE_A_RUN.fullmatch(e.name) for e in path.iterdir())
            again = " It was stopped before it began. Start it again with --out." if stopped else ""
            why = "it holds no run (no config.yaml)" if path.is_dir() else "there is no such folder"
            raise InputError(f"--resume {path}: {why}.{again or near_runs(path)}") from None
        except PermissionError:
            raise
        except (OSError, ValueError) as error:
            raise InputError(
                f"--resume {path}: its config.yaml cannot be read ({error})."
            ) from None
        try:
            return cls(path, validate_recipe(parse_yaml(text)))
        except ValueError as error:  # an InputError is one
            why = str(error).rstrip(".")
            raise InputError(f"--resume {path}: its config.yaml cannot be read: {why}.") from None

    # ------------------------------ changes

    def change(self, wanted: Recipe, *, searches: bool) -> None:
        """Switches to another recipe for later rounds, if the run may resume with it.

        Args:
            wanted: the recipe.
            searches: whether the folder holds a search, not only a training.

        Raises:
            InputError: naming a setting that may not change.
        """
        self.changes = planned_changes(self.path, self.written_recipe, wanted, searches=searches)
        self.recipe = wanted

    def record_changes(self, phase: str, round_number: int) -> None:
        """Records the changes that take effect after a round of a phase."""
        if not self.changes:
            return
        time = datetime.now().astimezone().isoformat(timespec="seconds")
        lines = change_lines(self.changes, time=time, phase=phase, round_number=round_number)
        before = text_of(self.path / CHANGES) if read_changes(self.path) else ""

        # The recipe comes first: if the record is missing, the difference is found like an edit.
        self.write(CONFIG, self.recipe.to_yaml())
        self.write(CHANGES, before + lines)
        self.written_recipe = self.recipe
        with self.writing(RESULT):  # a result of the earlier settings
            (self.path / RESULT).unlink(missing_ok=True)
        self.changes = ()

    # ------------------------------ files

    def write(self, name: str, text: str) -> None:
        """Writes a file, completely or not at all.

        Raises:
            InputError: if it cannot be written.
        """
        with self.writing(name):
            self._replace(name, text)

    def _replace(self, name: str, text: str) -> None:
        # A name that is replaced in one step always shows either the old file or the new one.
        with (
            replacing(self.path / name) as temporary,
            temporary.open("w", encoding="utf-8") as file,
        ):
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    @contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """Turns a failure to write (a full or read-only disk, say) into a user's error."""
        try:
            yield
        except OSError as error:
            raise InputError(
                f"{what} cannot be written in {self.path} ({self._reason(error)}). "
                f"{self._remedy()}, then resume with --resume. Nothing that was saved is lost."
            ) from None

    def _reason(self, error: OSError) -> str:
        return error.strerror or str(error) if self.path.is_dir() else GONE

    def _remedy(self) -> str:
        return "Free some space or fix the permissions" if self.path.is_dir() else "Put it back"

    def log(self, entry: dict[str, Any]) -> None:
        """Adds a line to metrics.jsonl, and passes it to the listeners.

        A line that cannot be written waits in memory until the next checkpoint.
        """
        try:
            self._log.add(entry)
        except OSError as error:
            self._warn(
                f"metrics.jsonl cannot be written in {self.path} ({self._reason(error)}); its "
                "lines wait in memory."
            )
        for listener in self.listeners:
            listener(entry)

    def _continue_log(self, length: int) -> None:
        """Continues metrics.jsonl from an earlier length."""
        try:
            self._log.go_to(length)
        except OSError as error:  # the next write cuts it to this length
            self._warn(
                f"metrics.jsonl cannot be written in {self.path} ({self._reason(error)}); it is "
                "tried again with the next line."
            )

    @contextmanager
    def attempting(self, what: str) -> Iterator[None]:
        """Downgrades a failure to make or to write an optional file to a warning.

        No failure of a picture or a report is worth losing a search of days.
        """
        try:
            yield
        except OSError as error:
            self._warn(
                f"{what} cannot be written in {self.path} ({self._reason(error)}). The run "
                "continues without it."
            )
        except Exception as error:  # noqa: BLE001 - whatever it is, it is said
            self._warn(
                f"{what} cannot be made ({type(error).__name__}: {error}). The run continues "
                "without it."
            )

    @staticmethod
    def _warn(message: str) -> None:
        warnings.warn(message, mlo.CheckpointWarning, stacklevel=3)

    def record_completion(self, made_by: dict[str, Any]) -> None:
        """Adds to environment.json what completed the run, which may have begun elsewhere."""
        if not self.writes:
            return
        with self.attempting(f"What completed the run (in {ENVIRONMENT})"):
            began = read_object(self.path / ENVIRONMENT)
            self.write(ENVIRONMENT, json.dumps({**began, "completed": made_by}, indent=1))

    def complete(self, result: str, made_by: dict[str, Any]) -> None:
        """Writes what completed the run, and then its result, which makes the run complete.

        Args:
            result: the text of result.json.
            made_by: versions and device; see `lfmcw_app.provenance`.
        """
        self.record_completion({**made_by, "keep": self.keep})
        self.write(RESULT, result)

    def finish_clearing(self) -> None:
        """Clears a complete run, if it was stopped between its result and the end of `clear`."""
        if self.writes and self.keep == "all":
            with self.attempting(f"The record of what to keep (in {ENVIRONMENT})"):
                completed = read_object(self.path / ENVIRONMENT).get("completed")
                keep = completed.get("keep", "all") if isinstance(completed, dict) else "all"
                self.keep = keep if isinstance(keep, str) and keep in KEEP else "all"
        self.clear()

    @property
    def begun(self) -> bool:
        """Whether there is a checkpoint to resume from."""
        return any(self.path.glob("*.pt"))

    @property
    def draws(self) -> bool:
        """Whether this process draws pictures and the report."""
        return self.writes and self.keep == "all"

    def clear(self) -> None:
        """Removes what a complete run need not keep; see `KEEP`.

        Only a run with a result is touched: until then its checkpoints are what it resumes from.
        """
        if not self.writes or self.result is None:
            return
        for pattern in KEEP[self.keep]:
            for path in self.path.glob(pattern):
                try:
                    path.unlink(missing_ok=True)  # another process may clear it too
                except OSError as error:
                    self._warn(
                        f"{path} cannot be removed ({error.strerror or error}), so it stays."
                    )

    def save_diagnosis(self, error: mlo.NonFiniteError) -> str:
        """Writes what is known about lost numbers, the first few times; says where."""
        if len(list(self.path.glob("nonfinite-*.pt"))) >= DIAGNOSES:
            return f"There are already {DIAGNOSES} diagnostic files; no more are written."
        name = f"nonfinite-{error.problem}-round-{error.round}.pt"
        try:
            mlo.save_checkpoint(error.data, self.path / name)
        except OSError as failure:
            return f"No diagnostic file can be written ({failure.strerror or failure})."
        return f"Details are in {self.path / name} (read it with mlo.load_checkpoint)."

    @property
    def samples(self) -> Path:
        """The folder of generated images through time."""
        return self.path / SAMPLES_FOLDER

    @property
    def metrics(self) -> Path:
        """The file of metrics."""
        return self.path / METRICS

    @property
    def result(self) -> dict[str, Any] | None:
        """The result, if the run is complete."""
        try:
            return read_result(self.path / RESULT)
        except FileNotFoundError:
            return None
        except PermissionError:  # it may be whole, and is not to be deleted
            raise
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.path / 'result.json'} is damaged ({error}). Delete it and resume. The "
                "result is then computed again."
            ) from None

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
            must: whether the run cannot continue without this checkpoint.
            best: whether it is the best of the phase.
            keep_as: number under which a copy is kept.

        Returns:
            Whether it was written; if not, there was a warning.

        Raises:
            InputError: if a required one could not be written, or `FAILED_SAVES` in a row could
                not.
        """
        # The lines come first: a checkpoint must not count lines that are not on the disk.
        try:
            self._log.write(flush=True)
            state = {
                "recipe": self.recipe.to_yaml(),
                "phase": phase,
                "metrics_bytes": self._log.length,
                "standing": phase_state,  # files of earlier versions have the key too
                "optimizer": optimizer.state_dict(),
            }
            self.checkpoints(phase).save(state, best=best, keep_as=keep_as)
        except OSError as error:
            self._failed_saves += 1
            what = (
                f"The checkpoint of round {optimizer.round} of {phase} cannot be written in "
                f"{self.path} ({self._reason(error)})"
            )
            if must or self._failed_saves >= FAILED_SAVES:
                often = f" ({self._failed_saves} in a row)" if self._failed_saves > 1 else ""
                raise InputError(
                    f"{what}{often}. The run stops, and the last checkpoint is kept. "
                    f"{self._remedy()}, then resume with --resume."
                ) from None
            self._warn(f"{what}. The run continues, and tries again at the next checkpoint.")
            return False
        self._failed_saves = 0
        return True

    def restore(
        self, phase: str, optimizer: mlo.MultilevelOptimizer, phases: Sequence[str]
    ) -> dict[str, Any]:
        """Loads a phase's checkpoint, if there is one; drops metrics written after the latest.

        If the last one is damaged, the one before it is loaded. If a later phase already has a
        checkpoint, the recomputed rounds add no lines, because metrics.jsonl has them.

        Args:
            phase: which.
            optimizer: what is restored.
            phases: all phases of the run, in their order.

        Returns:
            The `phase_state` that `save` was given; empty without a checkpoint.

        Raises:
            CheckpointError: if it is damaged or belongs to another run.
        """
        after = phases[phases.index(phase) + 1 :]
        later = [other for other in after if self.checkpoints(other).exists()]
        store = self.checkpoints(phase)
        state = store.load(partial(self._check, phase))
        self._log.repeats = bool(later)
        if state is None:
            if later:
                raise mlo.CheckpointError(
                    f"{self.path} has a checkpoint of {later[0]!r} but none of {phase!r} before it "
                    f"({phase}.pt). Put it back, or start again in a new folder."
                )
            self._continue_log(self._log.length)  # where the phase before this one ended
            return {}
        held = self._of_this_version(state["optimizer"], optimizer)
        optimizer.load_state_dict(with_declared_rates(held, optimizer))
        self._continue_log(state["metrics_bytes"])
        phase_state: dict[str, Any] = state.get("standing", {})
        return phase_state

    def roll_back(self, phase: str, optimizer: mlo.MultilevelOptimizer) -> dict[str, Any]:
        """Returns to the last checkpoint of a phase, for new batches and noise; drops later lines.

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
        optimizer.roll_back(self._of_this_version(state["optimizer"], optimizer))
        self._continue_log(state["metrics_bytes"])
        phase_state: dict[str, Any] = state["standing"]
        return phase_state

    def _of_this_version(
        self, state: dict[str, Any], optimizer: mlo.MultilevelOptimizer
    ) -> dict[str, Any]:
        """The state of an optimizer without running statistics that its modules do not keep."""
        # A state of another shape is left to the optimizer, which refuses it with a message.
        found = state.get("problems")
        problems, dropped = dict(found) if isinstance(found, dict) else {}, 0
        for name, problem in optimizer.problems.items():
            saved = problems.get(name)
            if isinstance(saved, dict) and isinstance(saved.get("module"), dict):
                kept, fewer = without_statistics(saved["module"], problem.module.state_dict())
                problems[name] = {**saved, "module": kept}
                dropped += fewer
        if dropped:
            self._warn(
                f"The checkpoint in {self.path} is of an earlier version, whose supernets kept "
                f"running statistics of BatchNorm. These {dropped} tensors are dropped, because "
                "no search reads them."
            )
        return {**state, "problems": problems} if dropped else state

    def _check(self, phase: str, state: dict[str, Any]) -> None:
        """Raises a CheckpointError unless a checkpoint is one of this phase of this run."""
        where = f"The checkpoint of {phase!r} in {self.path}"
        length = state.get("metrics_bytes")
        is_count = isinstance(length, int) and not isinstance(length, bool) and length >= 0
        parts = (state.get("optimizer"), state.get("standing", {}))
        is_text = isinstance(state.get("recipe", ""), str)
        if not is_count or not is_text or not all(isinstance(part, dict) for part in parts):
            raise mlo.CheckpointError(
                f"{where} is not a run's checkpoint: it lacks entries, or they were edited. Use "
                "another folder."
            )
        # Keys that are newer than the checkpoint have their defaults.
        try:
            recipe = validate_recipe(parse_yaml(state["recipe"]))
        except (KeyError, ValueError):  # an InputError is a ValueError
            recipe = None
        known = known_recipes(self.path, self.written_recipe)
        if state.get("phase") != phase or recipe not in known:
            raise mlo.CheckpointError(
                f"{where} ({phase}.pt) is from a recipe that this run has never had. Resume the "
                "run that it belongs to, or start again in a new folder."
            )


def _environment() -> dict[str, Any]:
    return {
        "command": _command(),
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "torchvision": version("torchvision"),
        "mlo": mlo.__version__,
        "commit": commit(),
        "cpu": device_kind(torch.device("cpu")),
        "platform": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        "processes": rank_and_size()[1],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _command() -> str:
    """The command line that started this process, ready to be typed again."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    program = ["python", "-m", spec.name] if spec is not None else [sys.argv[0]]
    return shlex.join([*program, *sys.argv[1:]])
