"""Reads files that anything may have written: within bounds of size, depth, numbers and texts.

A file of a run folder may have been edited, cut, or put there by somebody else. What is beyond a
bound is refused as what is no JSON: by a ValueError, which the caller turns into an error that
names the file and says what to do.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

__all__ = [
    "bytes_of",
    "check_regular",
    "lines_of",
    "parse_json",
    "parse_object",
    "read_object",
    "text_of",
]

LONGEST_TEXT = 16 * 2**20
"""Bytes of a file, or of a line of one."""

DEEPEST = 24
LONGEST_STRING = 20_000
MOST_SECTIONS = 500_000
"""Lists and objects in a text: an empty one of two characters takes 64 bytes of memory."""

LARGEST = 1e39
"""Largest number that is read: beyond single precision nothing was measured."""


# ------------------------------ files


def check_regular(path: Path) -> None:
    """Refuses what is no file on a disk: the end of a pipe or of a device may never come.

    Raises:
        OSError: if there is nothing of this name.
        ValueError: if it is a pipe, a socket or a device, or the name has a zero byte.
    """
    mode = path.stat().st_mode
    # (A folder is refused where it is opened, in words that everybody knows.)
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ValueError("it is a pipe, a socket or a device, not a file on a disk")


def bytes_of(path: Path, most: int = LONGEST_TEXT, *, pipes: bool = False) -> bytes:
    """The content of a file.

    Args:
        path: of the file.
        most: bytes that it may have.
        pipes: whether it may be a pipe, as a user names one by <(command).

    Raises:
        OSError: if it cannot be read.
        ValueError: if it has more bytes, or is no file.
    """
    if not pipes:
        check_regular(path)
    with path.open("rb") as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most:,} bytes")
    return content


def text_of(
    path: Path, most: int = LONGEST_TEXT, *, encoding: str = "utf-8", pipes: bool = False
) -> str:
    """The text of a file, with a line feed at the end of each line; see `bytes_of`.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it has more bytes, is no file, or no text in this encoding.
    """
    text = bytes_of(path, most, pipes=pipes).decode(encoding)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def lines_of(file: BinaryIO, most: int = LONGEST_TEXT, *, cut: bool = False) -> Iterator[bytes]:
    """The lines of a file, each of at most `most` + 1 bytes: of a longer one comes its beginning.

    Args:
        file: is read from where it stands.
        most: bytes of a line.
        cut: whether a last line without its end comes too; whoever wrote it was stopped there.
    """
    while line := file.readline(most + 1):
        if line.endswith(b"\n"):
            yield line
            continue
        rest = line
        while len(rest) == most + 1 and not rest.endswith(b"\n"):
            rest = file.readline(most + 1)
        if not (cut or rest.endswith(b"\n")):
            return
        yield line


# ------------------------------ JSON


def read_object(path: Path) -> dict[str, Any]:
    """Reads a file with one JSON object.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it holds something else, or is beyond a bound.
    """
    return parse_object(text_of(path))


def parse_object(text: str, *, printable: bool = False) -> dict[str, Any]:
    """Parses one JSON object; see `parse_json`.

    Raises:
        ValueError: if it is something else, or is beyond a bound.
    """
    value = parse_json(text, printable=printable)
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not an object")  # noqa: TRY004
    return value


def parse_json(text: str, *, printable: bool = False) -> Any:
    """Parses JSON.

    Args:
        text: of a file or a line.
        printable: whether to refuse halves of surrogate pairs, which a page cannot show. Names of
            files may have them.

    Raises:
        ValueError: if it is none, names a key twice in one object, or is beyond a bound.
    """
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"it has more than {LONGEST_TEXT:,} characters")
    if text.count("[") + text.count("{") > MOST_SECTIONS:
        raise ValueError(f"it has more than {MOST_SECTIONS:,} lists and objects")
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check(value, 0, printable=printable)
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, of which no entry hides another one of the same key."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys: set[str] = set()
        for key, _ in pairs:
            if key in keys:
                raise ValueError(f"the key {key[:80]!r} stands twice in one object")
            keys.add(key)
    return found


def _check(value: Any, depth: int, *, printable: bool) -> None:
    if depth > DEEPEST:
        raise ValueError("it is nested too deeply")
    if isinstance(value, dict):
        for key, entry in value.items():
            _check(key, depth, printable=printable)
            _check(entry, depth + 1, printable=printable)
    elif isinstance(value, list):
        for entry in value:
            _check(entry, depth + 1, printable=printable)
    elif isinstance(value, str):
        if len(value) > LONGEST_STRING:
            raise ValueError(f"a text has {len(value):,} characters")
        if printable:
            value.encode()
    elif isinstance(value, (int, float)) and LARGEST < abs(value) < math.inf:
        # (NaN and infinities are losses of runs that lost their numbers; charts leave them out.)
        raise ValueError(f"a number is beyond {LARGEST:g}")
