"""JSON of files that anything may have written: bounded in size, depth, numbers and texts."""

from __future__ import annotations

import json
import math
from typing import Any

__all__ = ["parse_bounded"]

LONGEST_TEXT = 16 * 2**20
"""Characters of a file, or of a line of one."""

DEEPEST = 24
LONGEST_STRING = 20_000
LARGEST = 1e39
"""Of numbers: beyond single precision nothing was measured."""


def parse_bounded(text: str) -> Any:
    """Parses JSON.

    Raises:
        ValueError: if it is none, or beyond a bound.
    """
    if len(text) > LONGEST_TEXT:
        raise ValueError(f"{len(text):,} characters are more than a report reads")
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check(value, 0)
    return value


def _check(value: Any, depth: int) -> None:
    if depth > DEEPEST:
        raise ValueError("it is nested too deeply")
    if isinstance(value, dict):
        for key, entry in value.items():
            _check(key, depth)
            _check(entry, depth + 1)
    elif isinstance(value, list):
        for entry in value:
            _check(entry, depth + 1)
    elif isinstance(value, str):
        if len(value) > LONGEST_STRING:
            raise ValueError(f"a text has {len(value):,} characters")
        value.encode()  # half of a surrogate pair cannot be written into a page
    elif isinstance(value, (int, float)) and LARGEST < abs(value) < math.inf:
        # (NaN and infinities are losses of runs that lost their numbers; charts leave them out.)
        raise ValueError(f"a number is beyond {LARGEST:g}")
