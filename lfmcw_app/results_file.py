"""The results file: one row per run and what made it, in one schema for every table and machine.

`lfmcw_app.table` writes it as runs.csv. The files in docs/data/ have the same schema, and the pages
of results are made from them. Rows of several machines can be in one file or in several.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lfmcw_app.bounded_files import text_of
from lfmcw_app.errors import InputError, shown
from lfmcw_app.output_files import replacing

__all__ = ["COLUMNS", "Row", "distinct", "read_results", "write_results"]


DATE = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}$"


class Row(BaseModel):
    """A run and what made it. Empty cells of the file are None, where a column allows it."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    table: str = Field(min_length=1, description="a name in arms.TABLES")
    arm: str = Field(min_length=1, description="its label in the table")
    seed: int = Field(ge=0)
    dataset: str = Field(min_length=1, description="of a folder of images the folder's name")
    preset: str = Field(min_length=1)
    space: str = Field(min_length=1)
    order: str | None = Field(description="first or second; empty without a search")
    generator: str | None = Field(description="its name; empty without one")
    method: str = Field(min_length=1, description="lfmcw, darts or random")
    condition: str | None = Field(description="conditions of the data; empty: none")
    settings: str | None = Field(description="other settings that differ from the preset's")
    test_error_percent: float = Field(ge=0, le=100)
    regret_percent: float | None = Field(
        ge=0, description="test error minus that of the best cell of the look-up, percentage points"
    )
    rank: int | None = Field(ge=1, description="of the cell among those of the look-up; 1: best")
    parameters: int | None = Field(ge=0, description="of the derived network")
    multiply_adds_millions: float | None = Field(ge=0)
    gan_test_percent: float | None = Field(
        ge=0, le=100, description="accuracy on generated pictures after training on real ones"
    )
    gan_train_percent: float | None = Field(
        ge=0, le=100, description="accuracy on real pictures after training on generated ones"
    )
    variety: float | None = Field(ge=0, description="within a class; of real pictures 1")
    search_seconds: float | None = Field(ge=0)
    training_seconds: float | None = Field(ge=0)
    version: str = Field(min_length=1, description="of this program")
    commit: str | None = Field(description="of its repository, where it ran from one")
    torch: str = Field(min_length=1)
    device: str = Field(min_length=1, description="model of the GPU, or of the CPU")
    date: str = Field(pattern=DATE, description="when the run was completed")
    recipe: str = Field(min_length=1, description="digest of recipe and data, in the folder's name")
    run: str = Field(min_length=1, description="name of the run folder")

    @model_validator(mode="before")
    @classmethod
    def _empty_cells(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        return {name: None if value == "" else value for name, value in values.items()}


LONGEST = 2**26
"""Bytes of a file: some 100,000 runs."""

SPREADSHEET = ("\ufeff", ";", "\t")
"""What a spreadsheet puts into the line of the columns."""

COLUMNS = tuple(Row.model_fields)
"""Names of the columns, in the order of the file."""


def write_results(path: Path, rows: Iterable[Row]) -> None:
    """Writes a results file, completely or not at all.

    Raises:
        OSError: if it cannot be written.
    """
    with (
        replacing(path) as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(row.model_dump() for row in rows)


def read_results(*paths: Path) -> list[Row]:
    """The rows of results files, file by file; a row in two of them is returned once.

    Raises:
        InputError: if a file cannot be read, has other columns, or holds a value that a column
            does not allow.
    """
    return distinct(row for path in paths for row in _rows(path))


def distinct(rows: Iterable[Row]) -> list[Row]:
    """The rows without repetitions, in their order."""
    return list(dict.fromkeys(rows))


def _rows(path: Path) -> Iterator[Row]:
    try:
        text = text_of(path, LONGEST)
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        _check_columns(path, reader.fieldnames or ())
        for cells in reader:
            yield _row(path, reader.line_num, cells)
    except InputError:
        raise
    except (OSError, ValueError, csv.Error) as error:
        raise InputError(f"The results file {path} cannot be read ({error}).") from None


def _check_columns(path: Path, names: Sequence[str]) -> None:
    if tuple(names) == COLUMNS:
        return
    if any(mark in name for name in names for mark in SPREADSHEET):
        raise InputError(
            f"{path} was saved by a spreadsheet, with other separators or a byte-order mark. It "
            "may have changed dates, decimal points and digests too, so it is not read. Take the "
            "runs.csv that lfmcw_app.table wrote."
        )
    missing = [name for name in COLUMNS if name not in names]
    others = [name for name in names if name not in COLUMNS]
    raise InputError(
        f"{path} is not a results file of this version: it lacks the columns "
        f"{', '.join(missing) or 'none'} and has others "
        f"({', '.join(map(shown, others)) or 'none'}), or its columns have another order. It "
        f"needs {', '.join(COLUMNS)}. Repeat the command of its table, which writes it again from "
        "the run folders."
    )


def _row(path: Path, line: int, cells: dict[str | Any, Any]) -> Row:
    where = f"{path}, line {line}"
    if None in cells or None in cells.values():
        raise InputError(f"{where}: it has not as many values as the {len(COLUMNS)} columns.")
    try:
        return Row.model_validate(cells)
    except ValidationError as error:
        first = error.errors()[0]
        column = ".".join(map(str, first["loc"]))
        message = f"{first['msg'][0].lower()}{first['msg'][1:]}"
        raise InputError(f"{where}: {column}: {message}, got {shown(first['input'])}.") from None
