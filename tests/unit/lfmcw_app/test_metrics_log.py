"""The file of metrics: whole lines, whatever happens to it."""

import json
import os

import pytest

import mlo
from lfmcw_app.metrics_log import MetricsLog


@pytest.fixture
def log(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", writes=True)
    for number in range(4):
        log.add({"round": number})
    return log


def rounds(log):
    return [json.loads(line)["round"] for line in log.path.read_text().splitlines()]


def resumed(log, length):
    again = MetricsLog(log.path, writes=True)
    again.go_to(length)
    return again


def test_lines_behind_the_length_are_dropped(log):
    length = log.length
    log.add({"round": "later"})
    resumed(log, length).add({"round": "again"})
    assert rounds(log) == [0, 1, 2, 3, "again"]


def test_part_of_a_line_of_a_failed_write_is_cut_off(log):
    with log.path.open("ab") as file:
        file.write(b'{"rou')
    log.add({"round": 4})
    assert rounds(log) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("left", [0, 1, 13, 14, 30], ids=str)
def test_a_file_shortened_meanwhile_continues_in_whole_lines(log, left):
    """A line has 13 characters and its end."""
    os.truncate(log.path, left)
    with pytest.warns(mlo.CheckpointWarning, match="was changed by something else"):
        log.add({"round": 4})
    log.add({"round": 5})
    assert rounds(log) == [*range(left // 13), 4, 5]
    assert log.length == log.path.stat().st_size


def test_a_file_deleted_meanwhile_begins_anew(log):
    log.path.unlink()
    with pytest.warns(mlo.CheckpointWarning, match="the run continues without them"):
        log.add({"round": 4})
    assert rounds(log) == [4]


@pytest.mark.parametrize("there", [True, False], ids=["shortened", "gone"])
def test_a_shortened_file_costs_no_run_that_resumes(log, there):
    length = log.length
    if there:
        os.truncate(log.path, 20)
    else:
        log.path.unlink()
    with pytest.warns(mlo.CheckpointWarning, match=f"should have {length} bytes"):
        again = resumed(log, length)
    again.add({"round": 4})
    assert rounds(log) == ([0, 4] if there else [4])


def test_a_long_line_without_an_end_is_cut_off(log):
    log.path.write_bytes(b'{"round": 0}\n' + b"x" * 200_000)
    with pytest.warns(mlo.CheckpointWarning):
        resumed(log, 200_000).add({"round": 1})
    assert rounds(log) == [0, 1]


def test_repeated_rounds_advance_over_lines_that_are_there(log):
    again = MetricsLog(log.path, writes=True)
    again.repeats = True
    again.go_to(0)
    for number in range(4):
        again.add({"round": number})
    assert rounds(log) == [0, 1, 2, 3]
    assert again.length == log.length


def test_a_process_that_does_not_write_leaves_the_file_alone(log):
    before = log.path.read_bytes()
    MetricsLog(log.path, writes=False).go_to(3)
    assert log.path.read_bytes() == before


def test_no_file_is_made_before_there_is_a_line(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl", writes=True)
    log.go_to(0)
    log.write(flush=True)
    assert not log.path.exists()
