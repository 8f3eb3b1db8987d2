"""The file metrics.jsonl, with one line per round, also if the run was resumed.

A checkpoint holds the length of the file. A run that resumes from it continues the file from there.
The file is for people and reports. The run does not need it, whatever happens to it.
"""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any, BinaryIO

import mlo

__all__ = ["MetricsLog"]


class MetricsLog:
    """Appends lines to a file of metrics; lines that cannot be written wait in memory.

    Args:
        path: of the file, which need not exist.
        writes: whether this process writes it.

    Attributes:
        length: bytes of the file up to the end of the last line that is known to be whole.
        repeats: whether the current rounds already have their lines in the file. Then only the
            length advances.
    """

    def __init__(self, path: Path, *, writes: bool) -> None:
        self.path = path
        self.length = 0
        self.repeats = False
        self._writes = writes
        self._pending: list[str] = []

    def add(self, entry: dict[str, Any]) -> None:
        """Adds a line; after a failure lines wait for the next `write`.

        Raises:
            OSError: if it cannot be written, for the first line that waits.
        """
        self._pending.append(json.dumps(entry) + "\n")
        if len(self._pending) == 1:
            self.write()

    def write(self, *, flush: bool = False) -> None:
        """Writes the lines that wait.

        Args:
            flush: whether to force them to the disk.

        Raises:
            OSError: if they cannot be written; they still wait.
        """
        text = "".join(self._pending).encode()
        if text and not self.repeats:
            with self.path.open("a+b") as file:
                self._find_end(file)
                file.write(text)
                file.flush()
        if flush and self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())
        self.length += len(text)
        self._pending.clear()

    def go_to(self, length: int) -> None:
        """Continues from an earlier length; later lines are dropped, unless rounds repeat."""
        self._pending.clear()
        self.length = length
        if self._writes and not self.repeats and (length or self.path.exists()):
            with self.path.open("a+b") as file:
                self._find_end(file)

    def _find_end(self, file: BinaryIO) -> None:
        """Cuts a file to `length`, or `length` to the whole lines of a file that has lost some.

        A failed write leaves part of a line, which is cut off. A file that was shortened or
        replaced meanwhile continues after its last whole line. Extending it to the old length would
        fill it with zero bytes.
        """
        there = file.seek(0, os.SEEK_END)
        end = _end_of_lines(file, min(there, self.length))
        if end < self.length:
            warnings.warn(
                f"{self.path} was changed by something else: it should have {self.length} bytes "
                f"in whole lines, but has {end}. The lines in between are lost, and the run "
                "continues without them.",
                mlo.CheckpointWarning,
                stacklevel=4,
            )
            self.length = end
        if there > end:
            file.truncate(end)
        file.seek(end)


def _end_of_lines(file: BinaryIO, limit: int) -> int:
    """The position, at most `limit`, behind the last line break of a file; 0 without one."""
    block = 1 << 16
    while limit > 0:
        start = max(0, limit - block)
        file.seek(start)
        found = file.read(limit - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        limit = start
    return 0
