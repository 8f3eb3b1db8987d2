"""The schema of results files, their reader and their writer."""

from __future__ import annotations

import pytest
from made_result_rows import result_row as row

from lfmcw_app.errors import InputError
from lfmcw_app.results_file import COLUMNS, read_results, write_results


def lines_of(path):
    return path.read_text("utf-8").splitlines()


def test_what_is_written_is_read_back(tmp_path):
    rows = [row(), row(seed=4, rank=1, regret_percent=0.0, arm='λ = 0, "quoted"\nand broken')]
    write_results(tmp_path / "runs.csv", rows)
    assert read_results(tmp_path / "runs.csv") == rows
    assert lines_of(tmp_path / "runs.csv")[0] == ",".join(COLUMNS)
    assert [path.name for path in tmp_path.iterdir()] == ["runs.csv"]


def test_files_of_two_machines_are_read_together(tmp_path):
    here, there = row(device="a CPU"), row(device="a GPU")
    write_results(tmp_path / "here.csv", [here])
    write_results(tmp_path / "both.csv", [here, there])
    assert read_results(tmp_path / "here.csv", tmp_path / "both.csv") == [here, there]


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path):
    write_results(tmp_path / "runs.csv", [row()])

    def failing():
        yield row(seed=5)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_results(tmp_path / "runs.csv", failing())
    assert read_results(tmp_path / "runs.csv") == [row()]
    assert [path.name for path in tmp_path.iterdir()] == ["runs.csv"]


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("49.75", "nan", "line 2: test_error_percent: input should be a finite number, got 'nan'"),
        ("49.75", "", "line 2: test_error_percent: input should be a valid number, got None"),
        ("49.75", "130", "test_error_percent: input should be less than or equal to 100"),
        (",3,", ",three,", "line 2: seed: input should be a valid integer"),
        ("2026-11-29", "29.11.2026", "line 2: date: string should match pattern"),
        ("table2,", "", "not as many values as the"),
        ("table2,", "table2,table2,", "not as many values as the"),
        ("device,", "machine,", r"lacks the columns device and has others \('machine'\)"),
        ("table,arm", "arm,table", "its columns have another order"),
    ],
)
def test_a_damaged_file_is_refused(old, new, words, tmp_path):
    write_results(tmp_path / "runs.csv", [row()])
    text = (tmp_path / "runs.csv").read_text("utf-8")
    assert old in text
    (tmp_path / "runs.csv").write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(InputError, match=words):
        read_results(tmp_path / "runs.csv")


@pytest.mark.parametrize(("mark", "separator"), [("\ufeff", ","), ("", ";"), ("\ufeff", "\t")])
def test_a_file_that_a_spreadsheet_saved_is_refused(mark, separator, tmp_path):
    write_results(tmp_path / "runs.csv", [row()])
    text = (tmp_path / "runs.csv").read_text("utf-8").replace(",", separator)
    (tmp_path / "runs.csv").write_text(mark + text, encoding="utf-8")
    with pytest.raises(InputError, match=r"saved by a spreadsheet, .* that lfmcw_app\.table wrote"):
        read_results(tmp_path / "runs.csv")


def test_a_file_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        read_results(tmp_path / "runs.csv")
    (tmp_path / "empty.csv").touch()
    with pytest.raises(InputError, match="not a results file"):
        read_results(tmp_path / "empty.csv")
