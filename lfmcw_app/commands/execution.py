"""How every command works: errors as one paragraph, stops by signals, a report and the result."""

from __future__ import annotations

import atexit
import gc
import os
import shlex
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from lfmcw_app.commands.command_line import command_line
from lfmcw_app.commands.interrupts import answered_interrupts
from lfmcw_app.errors import InputError, NumbersWarning
from lfmcw_app.parent_pipe import end_with_parent
from lfmcw_app.printing import printable, say
from lfmcw_app.run_files import REPORT
from lfmcw_app.steady_output import steady_output
from lfmcw_app.stopping import Stopped, interrupted_at_once, saved, stop_signals

if TYPE_CHECKING:
    from lfmcw_app.run_folder import RunFolder

__all__ = ["carry_out", "conclude", "main_of", "reported_errors", "stoppable"]


@contextmanager
def listening(folder: RunFolder, *, tensorboard: bool) -> Iterator[None]:
    """Writes a run's event files while the body runs, if asked to."""
    if not (tensorboard and folder.writes):
        yield
        return
    from lfmcw_app.tensorboard import EventFiles

    with closing(EventFiles(folder.path / "tensorboard")) as files:
        folder.listeners.append(files)
        yield


def carry_out(
    folder: RunFolder,
    console: Console,
    module: str,
    work: Callable[[], dict[str, Any]],
    *,
    tensorboard: bool,
) -> None:
    """Does the work of a run folder, writes its report and prints the result.

    Args:
        folder: of the run.
        console: where messages are printed.
        module: the command whose `--resume` resumes the run.
        work: returns the result.
        tensorboard: whether event files are written.
    """
    from lfmcw_app.complete_runs import is_complete  # slow to import, as a run's work is

    say(console, f"Run folder: {folder.path}")
    complete = is_complete(folder)
    if not complete and folder.begun and (changed := folder.changed_environment()):
        say(
            console,
            f"It began elsewhere ({', '.join(changed)}). It resumes, but its numbers may differ "
            "from those of an uninterrupted run in their last bits.",
        )
    go_on = f"python -m {module} --resume {shlex.quote(str(folder.path))}"
    with (
        stoppable(console, go_on, begun=folder.begun),
        listening(folder, tensorboard=tensorboard),
    ):
        result = work()  # of a complete run too: its data may have changed since
    if complete:
        say(console, "The run is complete, so nothing is left to do. Its result:")
    conclude(folder, result, console)


def conclude(folder: RunFolder, result: dict[str, Any], console: Console) -> None:
    """Writes the report of a complete run and prints its result."""
    # matplotlib takes a second to import, and `--help` does not need it.
    from lfmcw_app.report.page import write_report
    from lfmcw_app.result import print_result

    # The result is already in the folder, so a report that cannot be written is no failure.
    if folder.writes:
        if folder.draws:
            with folder.attempting(REPORT):
                write_report(folder.path)
        print_result(result, folder, console)


@contextmanager
def reported_errors(console: Console) -> Iterator[None]:
    """Shows a user's error as one paragraph and exits with code 2, or 75 if a folder is held.

    So is whatever the system refuses (a file without permission, a name that is too long, a full
    disk), wherever that is noticed. Other errors are bugs and keep their traceback. Warnings are
    shown as one paragraph too.
    """
    # This imports torch, which `--help` does not need.
    from PIL import Image

    import mlo as core
    from lfmcw_app.processes import check_launch

    user_errors = (
        InputError,
        core.CheckpointError,
        core.ConfigurationError,
        core.EngineError,
        core.GraphError,
        core.NonFiniteError,
        core.ProblemError,
    )
    rank = os.environ.get("RANK", "0")  # of this process, under torchrun
    number = int(rank) if rank.isdecimal() else 0

    def paragraph(kind: str, text: object) -> None:
        console.print(kind, end=" ")
        console.print(
            printable(" ".join(str(text).split())),
            highlight=False,
            markup=False,
            soft_wrap=not console.is_terminal,
        )

    def shown(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
        if number == 0:  # the other processes give the same warning
            paragraph("[bold yellow]Warning:[/]", message)

    with warnings.catch_warnings():
        # Each of these is a new event, even if its words are the same.
        for category in (core.CheckpointWarning, NumbersWarning):
            warnings.simplefilter("always", category)
        # Pillow's own limit, twice as high, refuses the file; below it the file is read.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        warnings.showwarning = shown
        begins = f"[bold red]Error{f' in process {number}' if number else ''}:[/]"
        try:
            _check_here()
            check_launch()
            yield
        except user_errors as error:
            paragraph(begins, error)
            code = error.exit_code if isinstance(error, InputError) else InputError.exit_code
            raise typer.Exit(code) from None
        except OSError as error:
            if error.strerror is None:  # raised by a library, not by the system
                raise
            paragraph(begins, _refused(error))
            raise typer.Exit(InputError.exit_code) from None


def _check_here() -> None:
    """Refuses a working directory that is gone: relative paths lead nowhere.

    Raises:
        InputError: saying so.
    """
    try:
        os.getcwd()
    except FileNotFoundError:
        raise InputError(
            "The working directory no longer exists, because it was deleted. Change to another "
            "one, then repeat the command."
        ) from None


def _refused(error: OSError) -> str:
    what = "A file that is needed" if error.filename is None else os.fsdecode(error.filename)
    remedy = "Mend that"
    if isinstance(error, PermissionError):
        remedy = "Give this process the permission"
    return (
        f"{what} cannot be used ({error.strerror}). Nothing of it is lost. {remedy}, then repeat "
        "the command."
    )


@contextmanager
def stoppable(console: Console, command: str, *, begun: bool = False) -> Iterator[None]:
    """Ends the body at SIGTERM (exit code 0) or SIGINT (130), and says how to resume.

    Args:
        console: where the message is printed.
        command: resumes the run.
        begun: whether the run has a checkpoint already.
    """

    def go_on(what: str) -> None:
        say(console, f"{what} Resume with: {command}")

    try:
        with stop_signals(f"Resume with: {command}", begun=begun):
            yield
    except Stopped as stop:
        what = "Interrupted" if stop.exit_code else "Stopped"
        go_on(f"{what}; the state is saved. The run resumes from {saved()}.")
        raise typer.Exit(stop.exit_code) from None
    except (Exception, KeyboardInterrupt) as error:
        if not (isinstance(error, KeyboardInterrupt) or interrupted_at_once()):
            raise
        go_on(f"Interrupted at once; the last checkpoint is kept. The run resumes from {saved()}.")
        raise typer.Exit(130) from None


def main_of(*commands: Callable[..., None], help: str | None = None) -> None:
    """Runs functions as a command line, with `--install-completion` for the shell.

    When Python ends, it would look for garbage among all objects, several times. With torch and the
    others these are 400,000, which took 2 to 7 seconds after the last line. Frozen ones are passed
    over.

    Args:
        commands: one, or several by their names.
        help: about several.
    """
    app = command_line(commands, help=help)
    end_with_parent()
    if os.environ.get("COLUMNS") == "0":  # unknown, as in some containers: tables would be empty
        del os.environ["COLUMNS"]
    atexit.register(gc.freeze)
    with steady_output(), answered_interrupts():
        app()
