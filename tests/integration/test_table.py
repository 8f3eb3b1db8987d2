"""Tables of the paper over seeds: what is compared, what can be said of it, and runs that are not
made twice.
"""

from __future__ import annotations

import csv

import pytest
from tiny_runs import called, settings

from lfmcw_app.arms import TABLES
from lfmcw_app.commands.table import table as table_command

SHORT = {"search.steps": 2, "evaluation.epochs": 1}
UNLIKE = {"search.primitives": None, "data.image_size": None}
"""All primitives and larger images: arms of a table find different cells."""


def table(folder, *arguments):
    """The table in `folder`, of runs in the folder beside it."""
    places = ("--threads=1", "--out", folder, f"--runs={folder.parent / 'runs'}")
    return called(table_command, *arguments, *places, *settings(**SHORT, **UNLIKE))


def rows(folder):
    with (folder / "runs.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_table_runs_only_what_is_missing(tmp_path):
    """A table is made run by run, and only what is missing is run."""
    finished = table(tmp_path / "t", "table4", "digits", "--seeds=1", "--jobs=2")
    assert finished.returncode == 0, finished.stderr
    assert "2 runs, 0 of them already complete" in finished.stdout
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").glob("*/metrics.jsonl")}
    assert len(first) == 2
    again = table(tmp_path / "t", "table4", "digits", "--seeds=2")
    assert again.returncode == 0, again.stderr
    assert "4 runs, 2 of them already complete" in again.stdout
    assert all(path.stat().st_mtime_ns == time for path, time in first.items())
    assert [(row["arm"], row["seed"]) for row in rows(tmp_path / "t")] == [
        (label, seed) for label in TABLES["table4"] for seed in "01"
    ]
    text = (tmp_path / "t" / "table.md").read_text()
    assert text.count("| 2 |") == 3  # runs of two arms, and seeds of their comparison
    assert "docs/data/runs/t.csv" in again.stdout
    projected = table(tmp_path / "t", "table4", "digits", "--seeds=3", "--dry-run")
    assert projected.returncode == 0, projected.stderr
    assert [line.split("│")[2:4] for line in projected.stdout.splitlines() if "images" in line][
        -2:
    ] == [["    3 ", "    2 "]] * 2
    assert "3, which are too few" in projected.stdout
    assert len(list((tmp_path / "runs").glob("*/config.yaml"))) == 4
    assert (tmp_path / "t" / "figure.png").stat().st_size > 5000
    # Another table has the run with real images too, and a folder of its own.
    other = table(tmp_path / "other", "table2", "digits", "--seeds=1")
    assert other.returncode == 0, other.stderr
    assert "2 runs, 1 of them already complete" in other.stdout
    shared = {row["run"] for row in rows(tmp_path / "t")} & {
        row["run"] for row in rows(tmp_path / "other")
    }
    assert len(shared) == 1
    changed = table(tmp_path / "t", "table4", "digits", "--seeds=1", "--set=search.lambda=0.5")
    assert changed.returncode == 2
    assert "a table of other settings" in changed.stderr


@pytest.mark.slow
def test_a_table_is_continued_on_another_machine(tmp_path):
    """The runs that a results file has are not made again, and need no folder."""
    here, there = tmp_path / "here" / "t", tmp_path / "there" / "t"
    made = table(there, "table2", "digits", "--seeds=1")
    assert made.returncode == 0, made.stderr
    results = there / "runs.csv"
    projected = table(here, "table2", "digits", "--seeds=2", "--reuse", results, "--dry-run")
    assert projected.returncode == 0, projected.stderr
    assert f"2 of 4 runs are taken from {results}." in projected.stdout.replace("\n", "")
    continued = table(here, "table2", "digits", "--seeds=2", "--reuse", results)
    assert continued.returncode == 0, continued.stderr
    assert "4 runs, 2 of them already complete" in continued.stdout
    assert len(list((here.parent / "runs").glob("*/config.yaml"))) == 2
    assert rows(here)[::2] == rows(there)
    # The seeds of two machines are put together without a run.
    second = table(there.with_name("u"), "table2", "digits", "--first-seed=1", "--seeds=1")
    assert second.returncode == 0, second.stderr
    joined = tmp_path / "joined" / "t"
    others = ("--reuse", results, "--reuse", there.with_name("u") / "runs.csv")
    both = table(joined, "table2", "digits", "--seeds=2", *others)
    assert both.returncode == 0, both.stderr
    assert [row["seed"] for row in rows(joined)] == ["0", "1", "0", "1"]
    assert not (joined.parent / "runs").exists()


def test_an_unknown_table_is_refused(tmp_path):
    finished = table(tmp_path / "t", "table3")
    assert finished.returncode == 2
    assert "Did you mean 'table2'" in finished.stderr or "Valid names" in finished.stderr
    assert not (tmp_path / "t").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("table2", "digits", "--set=seed=7"), "sets search.method, seed itself"),
        (("table2", "digits", "--set=search.method=darts"), "sets search.method, seed itself"),
        (("fig3", "digits", "--set=search.lambda=9"), "sets search.lambda, seed itself"),
        (("table5", "digits", "--set=search.method=darts"), "search.method must be lfmcw"),
        (
            ("controls", "digits", "--set=search.synthetic_only=true"),
            "synthetic_only needs generated images",
        ),
        (("table2", "digits", "--launcher=slrum"), "Did you mean 'slurm'"),
        (("table2", "digits", "--launcher-set=a=1"), "--launcher local has no options"),
        (("table2", "digits", "--keep=result"), "Did you mean 'results'"),
    ],
)
def test_settings_that_leave_nothing_to_compare_are_refused(arguments, words, tmp_path):
    finished = table(tmp_path / "t", *arguments)
    assert finished.returncode == 2, finished.stdout
    assert words in finished.stderr
    assert not (tmp_path / "t").exists()
    assert not list((tmp_path / "runs").glob("*/config.yaml"))


def test_a_configuration_that_makes_arms_alike_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text("search: {class_weighting: uniform}\n")
    finished = table(tmp_path / "t", "controls", "digits", f"--config={tmp_path / 'config.yaml'}")
    assert finished.returncode == 2, finished.stdout
    assert "'LFM-CW' and 'uniform class weights' of controls are the same search" in finished.stderr
