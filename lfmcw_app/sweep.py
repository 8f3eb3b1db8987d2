"""Makes many runs: in processes on this machine, on Ray, or on SLURM through submitit.

Each run is a separate command, `python -m lfmcw_app.run --resume FOLDER`, with its output in
FOLDER/log.txt. Whatever happens to it, the others continue. A run that is retried resumes from its
last checkpoint. Several sweeps may share run folders; each run is made by one of them.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from filelock import FileLock, Timeout

from lfmcw_app.bounded_files import check_regular
from lfmcw_app.errors import HeldError, InputError
from lfmcw_app.parent_pipe import start_child
from lfmcw_app.run_files import LOCK, LOG, RESULT
from mlo.errors import nearest

__all__ = ["LAUNCHERS", "Launcher", "Outcome", "make_launcher", "run_command", "sweep"]

USER_ERROR = InputError.exit_code
"""The exit code of an error in a run's input: a retry would fail again."""

HELD = HeldError.exit_code
"""The exit code where another process holds the run folder."""

POLL = 2.0
"""Seconds between looks at runs that other processes make."""


class Launcher(Protocol):
    """Where jobs run. Used in a `with`, whose end stops the running jobs."""

    def submit(self, command: Sequence[str], log: Path) -> Future[int]:
        """Starts `command`, its output added to `log`.

        The future holds its exit code, or the error that ended it.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended.

    Attributes:
        folder: the run folder.
        tries: how often it was started.
        failure: why it has no result after the last try; None if it has one.
    """

    folder: Path
    tries: int
    failure: str | None = None


def sweep(
    folders: Sequence[Path],
    command: Callable[[Path], Sequence[str]],
    launcher: Launcher,
    *,
    retries: int,
) -> Iterator[Outcome]:
    """Runs a command for every folder and yields outcomes as they arrive.

    Args:
        folders: the run folders, in the order in which they start.
        command: maps a folder to the command that starts or resumes its run.
        launcher: where the commands run.
        retries: how often a failed run is retried from its last checkpoint, unless its input is
            wrong.
    """
    pending: dict[Future[int], Path] = {
        launcher.submit(command(path), path / LOG): path for path in folders
    }
    tries = dict.fromkeys(folders, 1)
    elsewhere: list[Path] = []
    while pending or elsewhere:
        for future in wait(pending, return_when=FIRST_COMPLETED).done:
            path = pending.pop(future)
            code, failure = _ended(future, path)
            if code == HELD:  # it may have released it since
                elsewhere.append(path)
                continue

            # A run with wrong input would fail in the same way again.
            if failure is not None and code != USER_ERROR and tries[path] <= retries:
                tries[path] += 1
                pending[launcher.submit(command(path), path / LOG)] = path
                continue

            said = f"{failure}; see {path / LOG}" if failure is not None else None
            yield Outcome(folder=path, tries=tries[path], failure=said)

        # The runs of other sweeps come last: by then they may be complete, or given up.
        if elsewhere and not pending:
            free = [path for path in elsewhere if not _is_held(path)]
            elsewhere = [path for path in elsewhere if path not in free]
            for path in free:
                if (path / RESULT).exists():
                    yield Outcome(folder=path, tries=tries[path])
                else:
                    pending[launcher.submit(command(path), path / LOG)] = path
            if not free:
                time.sleep(POLL)


def _is_held(folder: Path) -> bool:
    """Whether another process runs in a run folder."""
    try:
        FileLock(folder / LOCK, timeout=0).acquire().lock.release()
    except Timeout:
        return True
    return False


def _ended(future: Future[int], folder: Path) -> tuple[int | None, str | None]:
    """The exit code, and what went wrong."""
    error = future.exception()
    if error is not None:  # the launcher lost the job: a worker died, or a node was taken away
        return None, f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    code = future.result()
    if code == USER_ERROR and (folder / RESULT).exists():
        return code, None  # another process has completed it while this one began
    if code == 0:  # a run that is asked to stop saves its state and ends well, without a result
        return code, None if (folder / RESULT).exists() else "stopped before its end"
    return code, f"killed by signal {-code}" if code < 0 else f"exit code {code}"


def run_command(command: Sequence[str], log: str) -> int:
    """Runs a command with its output added to `log`; returns its exit code. For any launcher."""
    _check_log(Path(log))
    with open(log, "ab") as output:
        return subprocess.run(
            list(command),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode


def _check_log(log: Path) -> None:
    """Refuses a pipe in place of a log: opening it would wait for a reader, perhaps for ever."""
    if log.exists():
        check_regular(log)


class _OfThisMachine(AbstractContextManager["_OfThisMachine"]):
    """Processes of this machine, up to `jobs` runs at a time."""

    def __init__(self, jobs: int) -> None:
        self._pool = ThreadPoolExecutor(jobs, thread_name_prefix="run")
        self._processes: set[subprocess.Popen[Any]] = set()
        # No process may start after the others have been told to end.
        self._lock = threading.RLock()
        self._stopped = False

    def submit(self, command: Sequence[str], log: Path) -> Future[int]:
        return self._pool.submit(self._run, list(command), log)

    def _run(self, command: list[str], log: Path) -> int:
        if (log.parent / RESULT).exists():  # another sweep took it first
            return 0
        _check_log(log)
        return self._carry_out(command, log)

    def _carry_out(self, command: list[str], log: Path) -> int:
        """Runs a command to its end, its output added to `log`; returns its exit code."""
        raise NotImplementedError

    def _check_not_stopped(self) -> None:
        if self._stopped:
            raise InterruptedError("the sweep was stopped")

    def _start(self, command: Sequence[str], **streams: Any) -> subprocess.Popen[Any]:
        """Starts a process that is told to end with the sweep, or with this process."""
        with self._lock:
            self._check_not_stopped()
            process = start_child(command, **streams)
            self._processes.add(process)
            return process

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._lock:
            self._stopped = True
            for process in list(self._processes):
                process.terminate()
        self._pool.shutdown(cancel_futures=True)


class LocalProcesses(_OfThisMachine):
    """One process per run."""

    def _carry_out(self, command: list[str], log: Path) -> int:
        with log.open("ab") as output:
            process = self._start(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
            try:
                return process.wait()
            finally:
                self._processes.discard(process)


class Workers(_OfThisMachine):
    """Processes that make one run after another.

    They import the program once and keep the data set (worker.py), while a process per run would do
    both again. If a worker dies, its run has failed, and another worker replaces it.
    """

    def __init__(self, jobs: int) -> None:
        super().__init__(jobs)
        self._idle: list[subprocess.Popen[str]] = []

    def _carry_out(self, command: list[str], log: Path) -> int:
        worker = self._take()
        assert worker.stdin is not None and worker.stdout is not None
        try:
            # Without the interpreter, because the worker is one.
            worker.stdin.write(json.dumps([command[1:], str(log.resolve())]) + "\n")
            worker.stdin.flush()
            answer = worker.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if answer:
            self._idle.append(worker)
            return int(answer)
        self._processes.discard(worker)
        return worker.wait()

    def _take(self) -> subprocess.Popen[str]:
        """An idle worker, or a new one."""
        with self._lock:
            self._check_not_stopped()
            if self._idle:
                return self._idle.pop()
            return self._start(
                [sys.executable, "-m", "lfmcw_app.worker"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, traceback)
        # A worker that has stopped its run properly waits for another one.
        for worker in self._processes:
            worker.communicate()


class RayTasks(AbstractContextManager["RayTasks"]):
    """Tasks of Ray, on a cluster (RAY_ADDRESS) or on this machine.

    Run folders must be on a file system that all workers see.

    Args:
        options: of `ray.remote(...).options`, such as num_cpus and num_gpus.
    """

    def __init__(self, options: Mapping[str, Any]) -> None:
        import ray

        self._ray = ray
        self._started = not ray.is_initialized()
        if self._started:
            ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.WARNING)
        # `sweep` itself retries from the last checkpoint.
        self._task = ray.remote(run_command).options(max_retries=0, **options)

    def submit(self, command: Sequence[str], log: Path) -> Future[int]:
        future: Future[int] = self._task.remote(list(command), str(log.resolve())).future()
        return future

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._started:
            self._ray.shutdown()


class SubmititJobs(AbstractContextManager["SubmititJobs"]):
    """Jobs of SLURM, by submitit.

    Args:
        jobs: how many are queued at a time.
        folder: for submitit's own files, on a file system that all nodes see.
        options: of submitit's `update_parameters`, such as timeout_min, slurm_partition,
            gpus_per_node.
        cluster: "slurm"; submitit's "local" runs the same without SLURM.
    """

    def __init__(
        self, jobs: int, folder: Path, options: Mapping[str, Any], cluster: str = "slurm"
    ) -> None:
        import submitit

        # submitit reports wrong options, and a missing SLURM, with many kinds of errors.
        try:
            self._executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
            self._executor.update_parameters(**options)
        except (RuntimeError, ValueError, TypeError, NameError) as error:
            raise InputError(f"--launcher slurm: {' '.join(str(error).split())}") from None
        self._pool = ThreadPoolExecutor(jobs, thread_name_prefix="job")
        self._running: set[Any] = set()

    def submit(self, command: Sequence[str], log: Path) -> Future[int]:
        return self._pool.submit(self._run, list(command), str(log.resolve()))

    def _run(self, command: list[str], log: str) -> int:
        job = self._executor.submit(run_command, command, log)
        self._running.add(job)
        try:
            code: int = job.result()
        finally:
            self._running.discard(job)
        return code

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)
        for job in list(self._running):
            job.cancel()


OF_THIS_MACHINE: dict[str, Callable[[int], AbstractContextManager[Launcher]]] = {
    "local": LocalProcesses,
    "workers": Workers,
}
LAUNCHERS = (*OF_THIS_MACHINE, "ray", "slurm")


def make_launcher(
    name: str, *, jobs: int, folder: Path, options: Mapping[str, Any]
) -> AbstractContextManager[Launcher]:
    """Makes a launcher, to be used in a `with`.

    Args:
        name: one of `LAUNCHERS`.
        jobs: how many runs at a time (with Ray: as its resources allow).
        folder: for the launcher's own files.
        options: passed on to Ray or submitit.

    Raises:
        InputError: for an unknown name, options of a launcher without options, or a launcher that
            is not installed.
    """
    if name not in LAUNCHERS:
        raise InputError(f"Unknown launcher {name!r}. {nearest(name, LAUNCHERS)}")
    if name in OF_THIS_MACHINE:
        if options:
            raise InputError(
                f"--launcher {name} has no options; drop --launcher-set {next(iter(options))}=…."
            )
        return OF_THIS_MACHINE[name](jobs)
    try:
        return RayTasks(options) if name == "ray" else SubmititJobs(jobs, folder, options)
    except ModuleNotFoundError as error:
        raise InputError(
            f"--launcher {name} needs {error.name}: pip install 'torch-mlo[{name}]'."
        ) from None


def resume_command(
    folder: Path,
    *,
    data: Path,
    device: str,
    threads: int,
    keep: str = "all",
    lookup: Path | None = None,
) -> list[str]:
    """The command that starts or resumes the run of a folder that holds a recipe."""
    settings = ["--data", str(data), "--device", device, "--threads", str(threads)]
    settings += ["--keep", keep] if keep != "all" else []
    if lookup is not None:  # the table may have moved since the recipe was written
        settings += ["--lookup", str(lookup)]
    return [sys.executable, "-m", "lfmcw_app.run", "--resume", str(folder), *settings]
