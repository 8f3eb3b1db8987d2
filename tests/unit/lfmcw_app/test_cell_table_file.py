"""The CSV file of a table of cells: read, begun, continued, and what of it is refused."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from made_cell_tables import made_error, rows_of, write_csv, write_nats_file, write_nats_folder

from lfmcw_app.cell_table_file import (
    COLUMNS,
    CellTableFile,
    Row,
    read_cell_table,
    write_cell_table,
)
from lfmcw_app.errors import InputError
from lfmcw_app.nats_bench import read_nats_bench
from lfmcw_app.search_space.nasbench201 import all_cells

KINDS = {"space": "nasbench201", "nodes": 3, "cells": 125, "seeds": 2, "dataset": "digits"}
HEAD = "".join(f"# {key}: {value}\n" for key, value in KINDS.items()) + ",".join(COLUMNS) + "\n"
LINE = "|none~0|+|none~0|none~1|,0,60.0,1000,12.5\n"


def opened(path, *, about=None, more=(), **change):
    return CellTableFile.open(path, **{**KINDS, **change}, about=about or {}, more=more)


def test_a_table_is_read_as_it_was_written(tmp_path):
    table = read_cell_table(write_csv(tmp_path / "cells.csv"), "digits")
    assert table.complete
    assert (table.space, table.nodes, table.expected, table.seeds) == ("nasbench201", 3, 125, 2)
    assert (table.name, table.about) == ("cells.csv", {"command": "made up"})
    cells = list(all_cells(3))
    for cell in cells:
        assert table.cells[cell.notation()].errors == {s: made_error(cell, s) for s in (0, 1)}
    row = list(rows_of(cells, 2))[100]
    assert table.cells[row.cell].parameters == row.parameters
    assert table.cells[row.cell].multiply_adds == row.multiply_adds_millions


def test_a_begun_table_continues_with_what_is_missing(tmp_path):
    path = write_csv(tmp_path / "cells.csv", leave_out=7)
    assert not read_cell_table(path).complete
    file = opened(path, about={"command": "another"})
    missing = [row for row in rows_of(all_cells(3), 2) if (row.cell, row.seed) not in file.done]
    assert len(missing) == 7
    for row in missing:
        file.append(row)
    table = read_cell_table(path)
    assert table.complete
    assert table.about == {"command": "made up"}  # what it began with


def test_a_row_that_was_cut_is_written_again(tmp_path):
    path = write_csv(tmp_path / "cells.csv", leave_out=3)
    whole = path.read_bytes()
    path.write_bytes(whole + b"|avg_pool_3x3~0|+|avg_pool_3x3~0|avg_p")
    with pytest.raises(InputError, match=r"last line of the table .* is cut"):
        read_cell_table(path)
    file = opened(path)
    assert path.read_bytes() == whole
    assert len(file.done) == 247


def test_further_columns_are_kept(tmp_path):
    path = tmp_path / "cells.csv"
    row = next(rows_of(all_cells(3), 1))
    opened(path, more=["seconds"]).append(row, seconds=2.5)
    assert path.read_text().splitlines()[-2:] == [
        ",".join([*COLUMNS, "seconds"]),
        "|none~0|+|none~0|none~1|,0,60.0,100000,12.5,2.5",
    ]
    assert read_cell_table(path).cells[row.cell].errors == {0: 60.0}
    with pytest.raises(InputError, match="another table, with the columns"):
        opened(path)


def test_a_row_is_written_once(tmp_path):
    path = tmp_path / "cells.csv"
    row = next(rows_of(all_cells(3), 1))
    opened(path).append(row)
    file = opened(path)
    with pytest.raises(ValueError, match="has a row of seed 0 already"):
        file.append(row)
    assert len(file.path.read_text().splitlines()) == 7


def test_two_processes_on_the_same_cells_leave_a_sound_table(tmp_path):
    """What the other has added is not added again; a row that it was killed in is removed."""
    path = tmp_path / "cells.csv"
    first, second = opened(path), opened(path)
    one, two, three = list(rows_of(all_cells(3), 1))[:3]
    first.append(one)
    with path.open("a") as file:
        file.write("|none~0|+|no")
    second.append(one, two)
    first.append(two, three)
    table = read_cell_table(path)
    assert list(table.cells) == [row.cell for row in (one, two, three)]
    assert first.done == {(row.cell, 0) for row in (one, two, three)}


def test_a_table_of_another_recipe_is_not_continued(tmp_path):
    path = tmp_path / "cells.csv"
    opened(path, made_of={"recipe": "abc", "seed list": "0 1"})
    opened(path, made_of={"recipe": "abc", "seed list": "0 1"})
    with pytest.raises(InputError, match="another table, with the recipe 'abc' instead of 'abd'"):
        opened(path, made_of={"recipe": "abd", "seed list": "0 1"})
    with pytest.raises(InputError, match="with the seed list '0 1' instead of '2 3'"):
        opened(path, made_of={"recipe": "abc", "seed list": "2 3"})


def test_a_table_that_does_not_say_its_recipe_is_only_read(tmp_path):
    path = write_csv(tmp_path / "cells.csv")
    assert read_cell_table(path).complete
    with pytest.raises(InputError, match=r"which recipe it was made.*'# recipe: abc'"):
        opened(path, made_of={"recipe": "abc"})


@pytest.mark.parametrize("key", KINDS)
def test_a_table_of_something_else_is_not_continued(key, tmp_path):
    path = write_csv(tmp_path / "cells.csv")
    other = {key: "other" if isinstance(KINDS[key], str) else 77}
    with pytest.raises(InputError, match=f"another table, with the {key}"):
        opened(path, **other)


def test_lines_may_end_as_spreadsheets_end_them(tmp_path):
    path = tmp_path / "cells.csv"
    path.write_bytes((HEAD + LINE).replace("\n", "\r\n").encode())
    assert next(iter(read_cell_table(path).cells.values())).errors == {0: 60.0}


WRONG = {
    "no head": (LINE, r"lacks the line '# space: …'"),
    "no space": (HEAD.replace("space", "speis"), r"lacks the line '# space: …'"),
    "no number": (HEAD.replace("125", "many"), r"'# cells: …' needs a whole number, got 'many'"),
    "no seed": (HEAD.replace(",seed,", ",sead,"), r"lacks the column seed"),
    "few fields": (HEAD + "|x|,0,60.0,1000\n", r"line 7: it has 4 fields instead of 5"),
    "no error": (HEAD + LINE.replace("60.0", "nan"), r"line 7: test_error_percent must be between"),
    "large error": (HEAD + LINE.replace("60.0", "100.5"), r"test_error_percent must be between"),
    "no whole seed": (HEAD + LINE.replace(",0,", ",0.5,"), r"line 7: invalid literal"),
    "twice": (HEAD + LINE + LINE, r"line 8: seed 0 of this cell has a row already"),
    "blank": (HEAD + "\n" + LINE, r"line 7: it has 0 fields"),
    "quotes": (HEAD + '"' + LINE, r"line 7: unexpected end of data"),
    "other bytes": (b"\xff\xfe", r"cannot be read"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_damaged_table_is_refused_with_its_line(kind, tmp_path):
    content, words = WRONG[kind]
    path = tmp_path / "cells.csv"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=words):
        read_cell_table(path)


def test_a_file_too_large_for_a_table_is_not_read(tmp_path, monkeypatch):
    path = write_csv(tmp_path / "cells.csv")
    monkeypatch.setattr("lfmcw_app.cell_table_file.LARGEST_FILE", path.stat().st_size)
    read_cell_table(path)
    monkeypatch.setattr("lfmcw_app.cell_table_file.LARGEST_FILE", path.stat().st_size - 1)
    with pytest.raises(InputError, match="has more than"):
        read_cell_table(path)


def test_another_data_set_is_refused_with_what_there_is(tmp_path):
    path = write_csv(tmp_path / "cells.csv", dataset="cifar10")
    with pytest.raises(InputError, match=r"errors on cifar10.*lookup\.dataset=cifar10"):
        read_cell_table(path, "folder:cifar")


def test_a_published_table_becomes_a_small_file(tmp_path):
    """What is read from NATS-Bench is the same after it was written as CSV."""
    table = read_nats_bench(write_nats_file(tmp_path), "cifar100")
    path = tmp_path / "nats.csv"
    write_cell_table(table, path)
    again = read_cell_table(path, "cifar100")
    assert again.cells == table.cells
    assert again.expected == table.expected == 15_625
    assert not again.complete  # a part of the cells
    assert again.about == {"file": table.name, **table.about}
    with pytest.raises(InputError, match="nothing is overwritten"):
        write_cell_table(table, path)


def test_the_documented_command_converts_the_folder(tmp_path, monkeypatch):
    page = (Path(__file__).parents[3] / "docs" / "nasbench201.md").read_text("utf-8")
    (command,) = re.findall(r"python -c '(.+?)'\n", page, re.DOTALL)
    folder = write_nats_folder(tmp_path)
    monkeypatch.chdir(tmp_path)
    exec(command, {})
    made = read_cell_table(tmp_path / "nats_cifar10.csv", "cifar10")
    assert made.cells == read_nats_bench(folder, "cifar10").cells


@pytest.mark.parametrize(
    "change",
    [{"cell": "a\nb"}, {"cell": ""}, {"test_error_percent": -1.0}, {"parameters": -1},
     {"multiply_adds_millions": float("inf")}],
)  # fmt: skip
def test_a_row_of_nonsense_is_not_made(change):
    values = {"cell": "|x|", "seed": 0, "test_error_percent": 1.0, "parameters": 1,
              "multiply_adds_millions": 1.0}  # fmt: skip
    Row(**values)
    with pytest.raises(ValueError, match=r"be between|not be negative|on one line"):
        Row(**{**values, **change})
