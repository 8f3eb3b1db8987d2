"""A table of all cells of a space as a CSV file, which grows by a row per trained network.

Lines `# key: value` say what was trained. A line with the names of the columns follows, then a row
for each cell and seed. Columns of other names are for people. Each row is on the disk before the
next network is trained. So a script that trains every cell can stop at any moment and continue
later, and several processes may share the work.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock

from lfmcw_app.bounded_files import bytes_of
from lfmcw_app.cell_table import CellTable, TrainedCell
from lfmcw_app.errors import InputError, shown
from lfmcw_app.output_files import check_new

__all__ = ["COLUMNS", "CellTableFile", "Row", "read_cell_table", "write_cell_table"]

COLUMNS = ("cell", "seed", "test_error_percent", "parameters", "multiply_adds_millions")
NUMBERS = ("nodes", "cells", "seeds")
NEEDED = ("space", *NUMBERS, "dataset")
"""Keys that the head must have. It may have more, such as command, commit and date."""

LARGEST_FILE = 2**26
"""Bytes. 15,625 cells with 3 seeds have 5 million."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """A trained network.

    Attributes:
        cell: in the notation of its space.
        seed: of the training.
        test_error_percent: of the trained network.
        parameters: trainable parameters.
        multiply_adds_millions: for one image.
    """

    cell: str
    seed: int
    test_error_percent: float
    parameters: int
    multiply_adds_millions: float

    def __post_init__(self) -> None:
        if not self.cell or "\n" in self.cell or "\r" in self.cell:
            raise ValueError(f"cell must be a notation on one line, got {shown(self.cell)}")
        if not 0.0 <= self.test_error_percent <= 100.0:
            raise ValueError(
                f"test_error_percent must be between 0 and 100, got {self.test_error_percent}"
            )
        if self.parameters < 0 or not 0.0 <= self.multiply_adds_millions < math.inf:
            raise ValueError("parameters and multiply_adds_millions must not be negative")

    @classmethod
    def of_texts(cls, texts: Mapping[str, str]) -> Row:
        """Reads the fields of a line, by the names of their columns.

        Raises:
            ValueError: naming the first thing that is wrong.
        """
        return cls(
            cell=texts["cell"],
            seed=int(texts["seed"]),
            test_error_percent=float(texts["test_error_percent"]),
            parameters=int(texts["parameters"]),
            multiply_adds_millions=float(texts["multiply_adds_millions"]),
        )


# ------------------------------ reading


def read_cell_table(path: Path, dataset: str | None = None) -> CellTable:
    """Reads a table.

    Args:
        path: the file.
        dataset: the data set that it must be of; None for any.

    Raises:
        InputError: naming the first line that is wrong, or the data set that it has.
    """
    text = _text(path)
    if not text.endswith("\n"):
        raise InputError(
            f"The last line of the table {path} is cut off, because its writer was stopped there. "
            "Run the writer again, or remove the line."
        )
    about, _, rows = _parsed(path, text)
    if dataset not in (None, about["dataset"]):
        raise InputError(
            f"The table {path} has errors on {about['dataset']}, but none on {shown(dataset)}. If "
            "these are the same images under another name, say so with --set "
            f"lookup.dataset={about['dataset']}."
        )
    numbers = {key: int(about[key]) for key in NUMBERS}
    return CellTable(
        name=path.name,
        space=about["space"],
        nodes=numbers["nodes"],
        dataset=about["dataset"],
        expected=numbers["cells"],
        seeds=numbers["seeds"],
        cells=_trained(rows),
        about={key: value for key, value in about.items() if key not in NEEDED},
    )


def _text(path: Path) -> str:
    try:
        return bytes_of(path, LARGEST_FILE).decode("utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"The table {path} cannot be read ({error}).") from None


def _parsed(path: Path, text: str) -> tuple[dict[str, str], list[str], list[Row]]:
    """What the head says, the names of the columns, and the rows."""
    about: dict[str, str] = {}
    lines = text.removesuffix("\n").split("\n")
    start = next((at for at, line in enumerate(lines) if not line.startswith("#")), len(lines))
    for line in lines[:start]:
        key, colon, value = line.removeprefix("#").partition(":")
        if colon:
            about[key.strip()] = value.strip()
    columns = "".join(lines[start : start + 1]).strip().split(",")
    missing = [f"the line '# {key}: …'" for key in NEEDED if not about.get(key)]
    missing += [f"the column {name}" for name in COLUMNS if name not in columns]
    if missing:
        raise InputError(
            f"{path} is not a table of trained cells: it lacks {missing[0]}. It begins with lines "
            f"'# key: value' for {', '.join(NEEDED)}; then come a line with the names of the "
            f"columns ({', '.join(COLUMNS)}) and a row for each cell and seed."
        )
    for key in NUMBERS:
        if not (about[key].isascii() and about[key].isdecimal() and len(about[key]) < 10):
            raise InputError(f"{path}: '# {key}: …' needs a whole number, got {shown(about[key])}.")
    return about, columns, list(_rows(path, lines, start + 1, columns))


def _rows(path: Path, lines: list[str], start: int, columns: list[str]) -> Iterator[Row]:
    """The rows, each of a cell and seed of its own."""
    known = set()
    for number, line in enumerate(lines[start:], start=start + 1):
        try:
            fields = next(csv.reader([line], strict=True))
            if len(fields) != len(columns):
                raise ValueError(f"it has {len(fields)} fields instead of {len(columns)}")
            row = Row.of_texts(dict(zip(columns, fields, strict=True)))
            if (row.cell, row.seed) in known:
                raise ValueError(f"seed {row.seed} of this cell has a row already")
        except (ValueError, csv.Error) as error:
            raise InputError(f"The table {path} is damaged: line {number}: {error}.") from None
        known.add((row.cell, row.seed))
        yield row


def _trained(rows: list[Row]) -> dict[str, TrainedCell]:
    errors: dict[str, dict[int, float]] = {}
    for row in rows:
        errors.setdefault(row.cell, {})[row.seed] = row.test_error_percent
    return {
        row.cell: TrainedCell(
            errors=errors[row.cell],
            parameters=row.parameters,
            multiply_adds=row.multiply_adds_millions,
        )
        for row in rows
    }


# ------------------------------ writing


class CellTableFile:
    """A table that is being made: opened again, it continues."""

    def __init__(self, path: Path, columns: Sequence[str], done: set[tuple[str, int]]) -> None:
        self.path = path
        self.done = done
        """(cell, seed) of the rows that are there."""
        self._columns = tuple(columns)

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        space: str,
        nodes: int,
        cells: int,
        seeds: int,
        dataset: str,
        about: Mapping[str, str],
        made_of: Mapping[str, str] | None = None,
        more: Sequence[str] = (),
    ) -> CellTableFile:
        """Starts a table, or continues it; a row that was cut off is removed.

        Args:
            path: the file.
            space: name of the search space.
            nodes: of a cell, as `search.nodes` counts them.
            cells: how many cells the space has.
            seeds: how many trainings each cell gets.
            dataset: on which networks are trained and tested.
            about: what else its head says, such as command, commit, torch, machine and date. A
                table that is continued keeps what it began with.
            made_of: what else its head says and must be the same in a table that is continued,
                such as digests of the recipe and of the data.
            more: names of further columns, after `COLUMNS`.

        Raises:
            InputError: if the file is another table, is damaged, or cannot be written.
        """
        fixed = {
            "space": space, "nodes": str(nodes), "cells": str(cells), "seeds": str(seeds),
            "dataset": dataset, **(made_of or {}),
        }  # fmt: skip
        columns = (*COLUMNS, *more)
        with _writing(path):
            if not path.exists():
                said = {**fixed, **about}.items()
                head = [f"# {key}: {' '.join(value.split())}\n" for key, value in said]
                _append(path, "".join([*head, ",".join(columns), "\n"]))
                return cls(path, columns, set())
            _drop_cut_line(path)
            held, present, rows = _parsed(path, _text(path))
        now = {**held, "columns": ", ".join(sorted(present))}
        for key, value in {**fixed, "columns": ", ".join(sorted(columns))}.items():
            if key not in now:
                raise InputError(
                    f"{path} does not say with which {key} it was made, so it can be read but not "
                    "continued. Name another file. If it is certainly the same, add the line '# "
                    f"{key}: {value}' at its head."
                )
            if now[key] != value:
                raise InputError(
                    f"{path} is another table, with the {key} {shown(now[key])} instead of "
                    f"{shown(value)}. Name another file."
                )
        return cls(path, present, {(row.cell, row.seed) for row in rows})

    def append(self, *rows: Row, **more: object) -> None:
        """Adds rows, which are on the disk when this returns.

        A row that another process has added since is not added again, and one that such a process
        has left cut is removed: two that share no work by mistake leave a table that can be read.

        Args:
            rows: each of a cell and seed that this object has not seen in the table.
            more: what the further columns hold in these rows.

        Raises:
            ValueError: if there is such a row.
            InputError: if they cannot be written, or the table was damaged meanwhile.
        """
        for row in rows:
            if (row.cell, row.seed) in self.done:
                raise ValueError(f"{row.cell} has a row of seed {row.seed} already")
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, lineterminator="\n")
        with _writing(self.path):
            _drop_cut_line(self.path)
            _, _, there = _parsed(self.path, _text(self.path))
            self.done.update((row.cell, row.seed) for row in there)
            for row in rows:
                if (row.cell, row.seed) not in self.done:
                    writer.writerow({**asdict(row), **more})
                    self.done.add((row.cell, row.seed))
            _append(self.path, text.getvalue())


def write_cell_table(table: CellTable, path: Path) -> None:
    """Writes a table that was read from another format into a new file.

    Raises:
        InputError: if there is such a file, or it cannot be written.
    """
    check_new(path)
    file = CellTableFile.open(
        path,
        space=table.space,
        nodes=table.nodes,
        cells=table.expected,
        seeds=table.seeds,
        dataset=table.dataset,
        about={"file": table.name, **table.about},
    )
    file.append(*(row for cell in table.cells.items() for row in _rows_of(*cell)))


def _rows_of(notation: str, cell: TrainedCell) -> Iterator[Row]:
    for seed, error in cell.errors.items():
        yield Row(
            cell=notation,
            seed=seed,
            test_error_percent=error,
            parameters=cell.parameters,
            multiply_adds_millions=cell.multiply_adds,
        )


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """One process at a time; a failure to write is the user's error."""
    try:
        with FileLock(f"{path}.lock"):
            yield
    except OSError as error:
        raise InputError(
            f"The table {path} cannot be written ({error.strerror or error}). Free some space or "
            "fix the permissions, then start again. Existing rows are kept."
        ) from None


def _append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _drop_cut_line(path: Path) -> None:
    """Removes what follows the last end of a line."""
    try:
        content = bytes_of(path, LARGEST_FILE)
    except ValueError as error:
        raise InputError(f"The table {path} cannot be read ({error}).") from None
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
