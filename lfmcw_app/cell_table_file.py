"""A table of all cells of a space as a CSV file, which grows by a row per trained network.

Lines `# key: value` say what was trained; then come a line with the names of the columns and a row
for each cell and seed. A row is written whole, so that a script that trains every cell can stop at
any moment and continue where it was.
"""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from lfmcw_app.cell_table import CellTable, TrainedCell
from lfmcw_app.errors import InputError, shown

__all__ = ["COLUMNS", "CellTableFile", "Row", "read_cell_table", "write_cell_table"]

COLUMNS = ("cell", "seed", "test_error_percent", "parameters", "multiply_adds_millions")
NUMBERS = ("nodes", "cells", "seeds")
NEEDED = ("space", *NUMBERS, "dataset")
"""What the lines at the head must say; they may say more, such as command, commit and date."""

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
            raise ValueError(f"cell is a notation on one line, got {shown(self.cell)}")
        if not 0.0 <= self.test_error_percent <= 100.0:
            raise ValueError(
                f"test_error_percent is between 0 and 100, got {self.test_error_percent}"
            )
        if self.parameters < 0 or not 0.0 <= self.multiply_adds_millions < math.inf:
            raise ValueError("parameters and multiply_adds_millions are not negative")

    @classmethod
    def of_fields(cls, fields: list[str]) -> Row:
        """Reads the fields of a line.

        Raises:
            ValueError: naming the first thing that is wrong.
        """
        if len(fields) != len(COLUMNS):
            raise ValueError(f"it has {len(fields)} fields instead of {len(COLUMNS)}")
        cell, seed, error, parameters, multiply_adds = fields
        return cls(
            cell=cell,
            seed=int(seed),
            test_error_percent=float(error),
            parameters=int(parameters),
            multiply_adds_millions=float(multiply_adds),
        )

    def line(self) -> str:
        """The row as a line of the file."""
        text = io.StringIO()
        values = [getattr(self, column) for column in COLUMNS]
        csv.writer(text, lineterminator="\n").writerow(values)
        return text.getvalue()


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
            f"The last line of the table {path} is cut: its writer was stopped there. Run the "
            "writer again, or remove the line."
        )
    about, rows = _parsed(path, text)
    if dataset not in (None, about["dataset"]):
        raise InputError(
            f"The table {path} has the errors on {about['dataset']}, and none on {shown(dataset)}. "
            "If these are the same images under another name, say so with --set "
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
        with path.open("rb") as file:
            content = file.read(LARGEST_FILE + 1)
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"The table {path} cannot be read ({error}).") from None
    if len(content) > LARGEST_FILE:
        raise InputError(f"The table {path} has more than {LARGEST_FILE:,} bytes.")
    return text


def _parsed(path: Path, text: str) -> tuple[dict[str, str], list[Row]]:
    """What the head says, and the rows."""
    about: dict[str, str] = {}
    lines = text.removesuffix("\n").split("\n")
    start = next((at for at, line in enumerate(lines) if not line.startswith("#")), len(lines))
    for line in lines[:start]:
        key, colon, value = line.removeprefix("#").partition(":")
        if colon:
            about[key.strip()] = value.strip()
    missing = [key for key in NEEDED if not about.get(key)]
    if missing or lines[start : start + 1] != [",".join(COLUMNS)]:
        wrong = f"lacks the line '# {missing[0]}: …'" if missing else "has other columns"
        raise InputError(
            f"{path} is no table of trained cells: it {wrong}. It begins with lines '# key: value' "
            f"for {', '.join(NEEDED)}, followed by the line {','.join(COLUMNS)}."
        )
    for key in NUMBERS:
        if not (about[key].isascii() and about[key].isdecimal() and 0 < len(about[key]) < 10):
            raise InputError(f"{path}: '# {key}: …' needs a whole number, got {shown(about[key])}.")
    return about, list(_rows(path, lines, start + 1))


def _rows(path: Path, lines: list[str], start: int) -> Iterator[Row]:
    """The rows, each of a cell and seed of its own."""
    known = set()
    for number, line in enumerate(lines[start:], start=start + 1):
        try:
            row = Row.of_fields(next(csv.reader([line], strict=True)))
            if (row.cell, row.seed) in known:
                raise ValueError(f"seed {row.seed} of this cell has a row already")
        except (ValueError, StopIteration, csv.Error) as error:
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

    def __init__(self, path: Path, done: set[tuple[str, int]]) -> None:
        self.path = path
        self.done = done
        """(cell, seed) of the rows that are there."""

    @classmethod
    def open(
        cls, path: Path, *, space: str, nodes: int, cells: int, seeds: int, dataset: str,
        about: Mapping[str, str],
    ) -> CellTableFile:  # fmt: skip
        """Begins a table, or continues it; the rest of a row that was cut is removed.

        Args:
            path: the file.
            space: name of the search space.
            nodes: of a cell, as `search.nodes` counts them.
            cells: how many cells the space has.
            seeds: how many trainings each cell gets.
            dataset: on which networks are trained and tested.
            about: what else its head says, such as command, commit, torch, machine and date. A
                table that is continued keeps what it began with.

        Raises:
            InputError: if the file is another table, is damaged, or cannot be written.
        """
        fixed = {
            "space": space, "nodes": str(nodes), "cells": str(cells), "seeds": str(seeds),
            "dataset": dataset,
        }  # fmt: skip
        try:
            if not path.exists():
                head = [f"# {key}: {_on_one_line(value)}\n" for key, value in {**fixed, **about}.items()]
                _append(path, "".join([*head, ",".join(COLUMNS), "\n"]))
                return cls(path, set())
            _drop_cut_line(path)
        except OSError as error:
            raise _unwritable(path, error) from None
        held, rows = _parsed(path, _text(path))
        for key, value in fixed.items():
            if held[key] != value:
                raise InputError(
                    f"{path} is the table of another {key}: {shown(held[key])} instead of "
                    f"{shown(value)}. Name another file."
                )
        return cls(path, {(row.cell, row.seed) for row in rows})

    def append(self, row: Row) -> None:
        """Adds a row; it is on the disk when this returns.

        Raises:
            ValueError: if the cell has a row of this seed.
            InputError: if it cannot be written.
        """
        if (row.cell, row.seed) in self.done:
            raise ValueError(f"{row.cell} has a row of seed {row.seed} already")
        try:
            _append(self.path, row.line())
        except OSError as error:
            raise _unwritable(self.path, error) from None
        self.done.add((row.cell, row.seed))


def write_cell_table(table: CellTable, path: Path) -> None:
    """Writes a table that was read from another format into a new file.

    Raises:
        InputError: if there is such a file, or it cannot be written.
    """
    if path.exists():
        raise InputError(f"{path} exists already, and nothing is overwritten. Name another file.")
    file = CellTableFile.open(
        path, space=table.space, nodes=table.nodes, cells=table.expected, seeds=table.seeds,
        dataset=table.dataset, about={"file": table.name, **table.about},
    )  # fmt: skip
    rows = [
        Row(
            cell=notation,
            seed=seed,
            test_error_percent=error,
            parameters=cell.parameters,
            multiply_adds_millions=cell.multiply_adds,
        )
        for notation, cell in table.cells.items()
        for seed, error in cell.errors.items()
    ]
    try:
        _append(file.path, "".join(row.line() for row in rows))
    except OSError as error:
        raise _unwritable(path, error) from None


def _append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8", newline="") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _drop_cut_line(path: Path) -> None:
    """Removes what follows the last end of a line."""
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


def _on_one_line(value: str) -> str:
    return " ".join(value.split())


def _unwritable(path: Path, error: OSError) -> InputError:
    return InputError(
        f"The table {path} cannot be written ({error.strerror or error}). Make room or give the "
        "permission, then start again: rows that are there are kept."
    )
