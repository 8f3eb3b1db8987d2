"""Strikes a process at its k-th change of the file system, seen through Python's audit events.

An audit event comes before the call that it announces. So a process that is killed there has made
all changes before the k-th, and not the k-th.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

CHANGES = (
    "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink",
)  # fmt: skip
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Strikes:
    """Counts changes below a folder, and strikes at one of them.

    Args:
        folder: changes elsewhere do not count.
        at: the number of the change that is struck, from 0.
        strike: is called there; None counts only.
        lasting: whether all later changes are struck too.
    """

    def __init__(
        self, folder: Path, at: int, strike: Callable[[], None] | None, *, lasting: bool
    ) -> None:
        self._folder, self._at, self._strike = os.path.realpath(folder), at, strike
        self._lasting = lasting
        self.seen: list[str] = []

    def __call__(self, event: str, arguments: tuple[object, ...]) -> None:
        """Is told of an audit event."""
        if event == "open":
            path, _, flags = arguments
            if not isinstance(flags, int) or not flags & WRITING:
                return
        elif event in CHANGES:
            path = arguments[0]
        else:
            return
        if not isinstance(path, (str, bytes, os.PathLike)):
            return  # a descriptor
        name = os.path.abspath(os.fsdecode(path))
        if name != self._folder and not name.startswith(self._folder + os.sep):
            return
        self.seen.append(f"{event} {os.path.basename(name)}")
        number = len(self.seen) - 1
        due = number >= self._at if self._lasting else number == self._at
        if due and self._strike is not None:
            self._strike()


_active: list[Strikes] = []
_installed: list[bool] = []


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    for strikes in _active:
        strikes(event, arguments)


@contextmanager
def striking(
    folder: Path,
    at: int = -1,
    strike: Callable[[], None] | None = None,
    *,
    lasting: bool = False,
) -> Iterator[Strikes]:
    """Strikes at a change that the body makes below a folder."""
    if not _installed:  # a hook cannot be taken out again
        sys.addaudithook(_hook)
        _installed.append(True)
    strikes = Strikes(folder, at, strike, lasting=lasting)
    _active.append(strikes)
    try:
        yield strikes
    finally:
        _active.remove(strikes)


def die() -> None:
    """As a kill: nothing else runs."""
    os.kill(os.getpid(), signal.SIGKILL)


def disk_is_full() -> None:
    """As the system says it."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def not_allowed() -> None:
    """As the system says it."""
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


def killed_at(folder: Path, at: int, body: Callable[[], None]) -> bool:
    """Whether a forked child that runs `body` came to its change number `at`, where it dies.

    Raises:
        AssertionError: if the child ended otherwise, with an error.
    """
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            with striking(folder, at, die):
                body()
            code = 0
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code != 0
