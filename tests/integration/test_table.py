"""Tables of the paper over seeds: what is compared, and runs that are not made twice."""

from __future__ import annotations

import csv
import math
import subprocess
import sys

import pytest

from lfmcw_app.table import ARMS, Summary, compare, summarise


def arm(label, *errors):
    return Summary(label=label, errors=dict(enumerate(errors)), parameters=dict.fromkeys(range(len(errors)), 1000))


def test_arms_are_compared_seed_by_seed():
    """Differences -1, -2, -3: mean -2, SD 1, and t(0.975, 2) = 4.303."""
    found = compare(arm("new", 9.0, 11.0, 13.0), arm("old", 10.0, 13.0, 16.0))
    assert found.difference == pytest.approx(-2.0)
    assert found.interval == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert found.pairs == 3


def test_only_seeds_that_both_have_are_paired():
    found = compare(arm("new", 9.0), arm("old", 10.0, 20.0))
    assert (found.difference, found.pairs) == (-1.0, 1)
    assert math.isnan(found.interval)


def test_a_table_says_what_one_run_cannot_show():
    text = summarise([arm("old", 10.0), arm("new", 9.5)])
    assert "| old | 10.00 | 1 |  | 1,000 |" in text
    assert "-0.50 (one pair only)" in text


def test_the_arms_are_those_of_the_paper():
    assert set(ARMS) == {"table2", "table4", "table5", "fig3"}
    assert {arm["search.generator.name"] for arm in ARMS["table5"].values()} == {"dcgan", "wgan_gp", "biggan"}
    assert 0.0 in {arm["search.lambda"] for arm in ARMS["fig3"].values()}


TINY = (
    "search.channels=4 search.nodes=1 search.steps=2 search.batch_size=8 search.generator.channels=2 "
    "search.generator.noise_dim=4 data.search_images=80 data.train_images=60 data.test_images=50 evaluation.channels=2 "
    "evaluation.epochs=1 evaluation.batch_size=16"
)


def table(folder, *arguments):
    settings = [f"--set={setting}" for setting in TINY.split()]
    command = [sys.executable, "-m", "lfmcw_app.table", *arguments, "--threads=1", "--out", str(folder), *settings]
    return subprocess.run(command, capture_output=True, text=True, timeout=280)


@pytest.mark.slow
def test_a_table_is_made_run_by_run_and_only_what_is_missing_is_run(tmp_path):
    finished = table(tmp_path / "t", "table4", "digits", "--seeds=1")
    assert finished.returncode == 0, finished.stderr
    first = {path: path.stat().st_mtime_ns for path in (tmp_path / "t").glob("*/0/metrics.jsonl")}
    assert len(first) == 2
    again = table(tmp_path / "t", "table4", "digits", "--seeds=2")
    assert again.returncode == 0, again.stderr
    assert all(path.stat().st_mtime_ns == time for path, time in first.items())
    with (tmp_path / "t" / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["arm"], row["seed"]) for row in rows] == [(label, seed) for label in ARMS["table4"] for seed in "01"]
    text = (tmp_path / "t" / "table.md").read_text()
    assert text.count("| 2 |") == 2
    assert (tmp_path / "t" / "figure.png").stat().st_size > 5000
    other = table(tmp_path / "t", "table4", "digits", "--seeds=1", "--set=search.lambda=0.5")
    assert other.returncode == 2
    assert "another recipe" in other.stderr


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
    ],
)
def test_settings_that_would_make_arms_or_seeds_alike_are_refused(arguments, words, tmp_path):
    finished = table(tmp_path / "t", *arguments)
    assert finished.returncode == 2, finished.stdout
    assert words in finished.stderr
    assert not (tmp_path / "t").exists()
