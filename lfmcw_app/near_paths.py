"""Advice for a path that does not exist, or holds no run: what is near it."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from lfmcw_app.errors import listed
from lfmcw_app.run_files import CONFIG

__all__ = ["near_paths", "near_runs"]

MOST_NAMES = 10_000
"""So many entries of a folder are looked at."""

LONGEST = 4096
"""Letters of a path: no system has longer ones."""

MOST_NEAR = 3
"""So many neighbours are named."""


def near_paths(path: Path, wanted: Callable[[Path], bool] = os.path.exists) -> str:
    """A question that names paths like one that does not exist.

    Args:
        path: what was given; a wrong name of a folder above it is seen too.
        wanted: whether a path that exists could have been meant.

    Returns:
        A sentence with a blank before it, or "" if nothing is near.
    """
    if len(str(path)) > LONGEST:
        return ""
    near = [str(found) for found in _near(path) if wanted(found)][:MOST_NEAR]
    return f" Did you mean {' or '.join(near)}?" if near else ""


def near_runs(path: Path) -> str:
    """Names the run folders near a path that holds no run; "" if there are none.

    Those of a similar name come first; otherwise the newest ones in the folder, or beside it.
    """
    if meant := near_paths(path, _holds_run):
        return meant
    for folder in (path, path.parent):
        dated = [(-os.path.getmtime(run / CONFIG), str(run)) for run in _runs_in(folder)]
        if dated:
            runs = [run for _, run in sorted(dated)]
            return f" There are runs in {folder}, the newest first: {listed(runs)}."
    return ""


def _near(path: Path) -> list[Path]:
    """The paths that exist and are like one, the most similar first."""
    if path.parent == path:
        return []
    folders = [path.parent] if os.path.isdir(path.parent) else _near(path.parent)
    found = []
    for folder in folders:
        by_lower: dict[str, list[str]] = {}
        for name in _names(folder):
            by_lower.setdefault(name.lower(), []).append(name)
        for lower in difflib.get_close_matches(path.name.lower(), by_lower, n=MOST_NEAR):
            found += [folder / name for name in by_lower[lower]]
    return [near for near in found if near != path]


def _names(folder: Path) -> list[str]:
    """The names of what a folder shows, sorted; none if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in islice(entries, MOST_NAMES)]
    except OSError:
        return []
    return sorted(name for name in names if not name.startswith("."))


def _runs_in(folder: Path) -> Iterator[Path]:
    return (folder / name for name in _names(folder) if _holds_run(folder / name))


def _holds_run(path: Path) -> bool:
    return os.path.isfile(path / CONFIG)
