"""Commands of the application, called in this process as their command lines call them.

A process of its own takes two seconds to import PyTorch; it is for tests of what only a process
has: signals, kills, exit codes and an environment.
"""

from __future__ import annotations

import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import typer
from typer.testing import CliRunner


@dataclass(frozen=True, kw_only=True)
class Call:
    """How a command ended, in the names of `subprocess.CompletedProcess`."""

    returncode: int
    stdout: str
    stderr: str

    @property
    def words(self):
        """All that was printed, with one blank between two words."""
        return " ".join((self.stdout + self.stderr).split())


def call(command, *arguments):
    """Calls the function of a command; an error that it does not report is one of the test."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(command)
    with warnings.catch_warnings(), own_signals():
        warnings.simplefilter("default")  # are shown, as on the command line
        done = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
    return Call(returncode=done.exit_code, stdout=done.stdout, stderr=done.stderr)


@contextmanager
def own_signals() -> Iterator[None]:
    """Puts back what signals mean to this process, which a command may set for its own."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
