"""Makes this process obey the modes of files, which root ignores."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

VERSION = 0x20080522
"""_LINUX_CAPABILITY_VERSION_3 of linux/capability.h."""

IGNORE_MODES = 1 << 1 | 1 << 2
"""CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""


@contextmanager
def modes_obeyed() -> Iterator[None]:
    """Takes this thread, and threads that it starts, what lets it use files of any mode.

    Raises:
        OSError: if the system refuses it.
    """
    if os.geteuid() != 0:
        yield
        return
    header = (ctypes.c_uint32 * 2)(VERSION, 0)
    held = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 of them
    _call("capget", header, held)
    before, held[0] = held[0], held[0] & ~IGNORE_MODES
    _call("capset", header, held)
    try:
        yield
    finally:
        held[0] = before
        _call("capset", header, held)


@contextmanager
def with_mode(path: Path, mode: int) -> Iterator[None]:
    """Gives a file or folder another mode, which is obeyed, while the body runs."""
    before = path.stat().st_mode
    path.chmod(mode)
    try:
        with modes_obeyed():
            yield
    finally:
        if path.exists():  # what tidies a folder may have removed it
            path.chmod(before)


def _call(name: str, header: ctypes.Array[ctypes.c_uint32], held: ctypes.Array) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(header, held) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
