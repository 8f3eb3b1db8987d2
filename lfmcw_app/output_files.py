"""Files and folders that commands write where the user says, completely or not at all."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lfmcw_app.errors import InputError
from lfmcw_app.stopping import unwound

__all__ = ["check_new", "completed", "leftovers", "new_file", "replacing"]

LEFTOVER = re.compile(r"\..+\.part(\.\w+)?")
"""Names of temporary files: those of `replacing`, and of `mlo.save_checkpoint`."""

_completed: set[Path] = set()


def completed() -> bool:
    """Whether this process has completed a file."""
    return bool(_completed)


def check_new(path: Path) -> None:
    """Checks that a file can be made, before anything is computed for it.

    Raises:
        InputError: if it exists, or its folder does not, or nothing can be written there.
    """
    if os.path.lexists(path):  # a link that leads nowhere is there too
        raise InputError(
            f"{path} already exists, and nothing is overwritten. Name another file, or remove it."
        )
    if not path.parent.is_dir():
        raise InputError(f"{path} cannot be written: there is no folder {path.parent}.")
    unfinished = _unfinished(path)
    with _refused(path):
        unfinished.touch()
        unfinished.unlink()


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path, which gets the name `path` when the body has ended.

    If the body fails, nothing is left.

    Raises:
        InputError: if the file exists, or cannot be written.
    """
    check_new(path)
    with _refused(path), replacing(path) as temporary:
        yield temporary


@contextmanager
def _refused(path: Path) -> Iterator[None]:
    """Turns a failure to write a file into a user's error."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror or error}). Free some space, fix the "
            "permissions, or name another file."
        ) from None


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path; what is made there replaces `path` when the body has ended well.

    If the body fails, or a signal ends the process, what was there stays.

    Raises:
        OSError: if the file cannot be written.
    """
    temporary = _unfinished(path)
    try:
        with unwound():
            yield temporary
            temporary.replace(path)
        _completed.add(path)
    finally:
        remove(temporary)


def _unfinished(path: Path) -> Path:
    # In the same folder, so that it can be renamed, and with the same ending, which some writers
    # read. Two commands may write the same file: each has its own name until it is complete.
    return path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")


def remove(path: Path) -> None:
    """Removes a file, or a folder with its files, if it is there.

    Raises:
        OSError: if it cannot be removed.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def leftovers(folder: Path) -> list[Path]:
    """The temporary files and folders in a folder that killed writers have left."""
    return [path for path in folder.iterdir() if LEFTOVER.fullmatch(path.name)]
