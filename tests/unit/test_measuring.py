"""Benchmarks measure in turns, and their files say how they were made."""

from __future__ import annotations

import csv
import json
import sys

import measure_all
import pytest
from measuring import PROVENANCE, Ratio, Worker, asked_in_turns, turns, write_measurements

WORKER = """
from measuring import answers
found = iter([1.0, 2.0, 3.0])
answers({"time": lambda: {"seconds": next(found)}, "fail": lambda: 1 / 0})
"""


def rows_in(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def worker(monkeypatch):
    """Makes processes that answer requests, and ends them."""
    made = []

    def make(code=WORKER):
        made.append(Worker(["-c", code], PYTHONPATH=":".join(sys.path)))
        return made[-1]

    yield make
    for process in made:
        process.close()


def test_a_ratio_is_of_the_two_sides_of_a_turn():
    """A turn in which the machine was ten times as slow changes nothing."""
    assert Ratio.of([2.0, 40.0, 3.0], [1.0, 20.0, 1.0]) == Ratio(median=2.0, low=2.0, high=2.5)
    assert str(Ratio.of([2.0, 40.0, 3.0], [1.0, 20.0, 1.0])) == "2.00 (2.00–2.50)"


def test_one_turn_has_no_quartiles():
    assert str(Ratio.of([3.0], [2.0])) == "1.50"


def test_every_side_has_every_place_in_a_turn_equally_often():
    order, ticks = [], iter(range(1000))
    sides = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = turns(sides, 6, lambda: next(ticks), uncounted=6)
    assert {name: len(found) for name, found in times.items()} == dict.fromkeys("abc", 6)
    firsts = order[18::3]
    assert sorted(firsts) == ["a", "a", "b", "b", "c", "c"]


def test_a_part_measured_again_takes_the_place_of_its_rows(tmp_path):
    path = tmp_path / "of" / "engines.csv"
    write_measurements(
        path, [{"problem": "a", "ms": 1}, {"problem": "b", "ms": 2}], part=("problem",)
    )
    write_measurements(path, [{"problem": "a", "ms": 3}], part=("problem",))
    assert [(row["problem"], row["ms"]) for row in rows_in(path)] == [("b", "2"), ("a", "3")]


def test_a_file_with_other_columns_is_not_mixed(tmp_path):
    write_measurements(tmp_path / "a.csv", [{"problem": "a", "ms": 1}], part=("problem",))
    with pytest.raises(ValueError, match="Remove the file and measure all of its parts again"):
        write_measurements(tmp_path / "a.csv", [{"problem": "b", "s": 1}], part=("problem",))


def test_rows_say_how_they_were_made(tmp_path, monkeypatch):
    script = measure_all.ROOT / "benchmarks" / "chain.py"
    path = tmp_path / "a.csv"
    monkeypatch.setattr(sys, "argv", [str(script), "--longest", "3", "--csv", str(path)])
    write_measurements(path, [{"problem": "a"}], part=("problem",), packages=("torch", "no-such"))
    (row,) = rows_in(path)
    assert list(row) == ["problem", *PROVENANCE]
    assert row["command"] == "python benchmarks/chain.py --longest 3"
    assert "torch 2" in row["versions"] and "no-such not installed" in row["versions"]
    assert "cores, " in row["machine"]


def test_only_what_was_measured_at_this_commit_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(measure_all, "DATA", tmp_path)
    script = str(measure_all.ROOT / "benchmarks" / "chain.py")
    monkeypatch.setattr(sys, "argv", [script, "--csv", "f"])
    write_measurements(tmp_path / "chain.csv", [{"problem": "a"}], part=("problem",))
    (row,) = rows_in(tmp_path / "chain.csv")
    assert measure_all.is_measured("chain", "chain.py", row["commit"])
    assert not measure_all.is_measured("chain", "chain.py", "another")
    assert not measure_all.is_measured("chain", "chain.py --longest 3", row["commit"])
    assert not measure_all.is_measured("engines", "engines.py", row["commit"])


def test_processes_take_turns_and_one_that_fails_has_no_times(worker):
    failing = 'answers = __import__("measuring").answers\nanswers({"time": lambda: 1 / 0})'
    times, failed = asked_in_turns({"a": worker(), "b": worker(failing), "c": worker()}, 2, 60)
    assert times == {"a": [1.0, 2.0], "c": [1.0, 2.0]}
    assert failed == {"b": "ZeroDivisionError: division by zero"}


def test_a_process_that_dies_or_is_late_says_so(worker):
    assert worker("raise SystemExit(3)").ask("time", 60) == {
        "failed": "the process ended with code 3"
    }
    waiting = worker("import sys\nsys.stdin.read()")
    assert waiting.ask("time", 0.1) == {"failed": "over 0.1 s (time)"}


def test_what_is_measured_may_print(worker):
    noisy = (
        "from measuring import answers\n"
        "def loud():\n    print('hello')\n    return {'seconds': 1}\n"
        "answers({'time': loud})"
    )
    assert json.dumps(worker(noisy).ask("time", 60)) == '{"seconds": 1}'
