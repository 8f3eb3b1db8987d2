"""Results of a table's runs that come from results files."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lfmcw_app.data import load_dataset
from lfmcw_app.errors import InputError
from lfmcw_app.fingerprint import Fingerprint
from lfmcw_app.recipe_loading import load_recipe
from lfmcw_app.result_rows import columns_of
from lfmcw_app.results_file import Row, read_results, write_results
from lfmcw_app.reused_results import reused_results
from lfmcw_app.table_files import TableReport, run_digest


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


def recipe(seed, dataset="digits", **overrides):
    return load_recipe("smoke", overrides={"seed": seed, "dataset": dataset, **overrides})


def row(recipe, dataset, *, error=5.0, table="table2", arm="LFM-CW"):
    """The row of a complete run elsewhere."""
    unknown = dict.fromkeys(
        (
            "regret_percent", "rank", "parameters", "multiply_adds_millions", "gan_test_percent",
            "gan_train_percent", "variety", "search_seconds", "training_seconds", "commit",
        )
    )  # fmt: skip
    return Row(
        **columns_of(recipe), **unknown, table=table, arm=arm, test_error_percent=error,
        version="0.1", torch="2.6", device="CPU", date="2026-11-30",
        recipe=run_digest(recipe, dataset), run="elsewhere",
    )  # fmt: skip


def keyed(*seeds, **overrides):
    return {("LFM-CW", seed): recipe(seed, **overrides) for seed in seeds}


def test_runs_that_a_file_has_are_taken_from_it(tmp_path, digits):
    write_results(tmp_path / "runs.csv", [row(recipe(seed), digits) for seed in (0, 1, 7)])
    found, said = reused_results([tmp_path / "runs.csv"], keyed(0, 1, 2), digits)
    assert set(found) == {("LFM-CW", 0), ("LFM-CW", 1)}
    assert said == [f"2 of 3 runs are taken from {tmp_path / 'runs.csv'}."]


def test_a_run_is_taken_wherever_its_images_lay(tmp_path, digits):
    """The row then has the name that the data set has here, so that all rows are one experiment."""
    there = recipe(0, dataset="folder:/there/photos")
    write_results(tmp_path / "runs.csv", [row(there, digits)])
    here = keyed(0, dataset="folder:/here/pictures")
    found, _ = reused_results([tmp_path / "runs.csv"], here, digits)
    assert found["LFM-CW", 0].dataset == "pictures"


def test_a_run_that_two_files_have_is_that_of_the_first(tmp_path, digits):
    files = [tmp_path / "one.csv", tmp_path / "two.csv"]
    for file, error in zip(files, (5.0, 6.0), strict=True):
        write_results(file, [row(recipe(0), digits, error=error)])
    found, said = reused_results(files, keyed(0), digits)
    assert found["LFM-CW", 0].test_error_percent == 5.0
    assert "which has 1 more that an earlier file has" in said[1]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"search.steps": 3}, "settings is 'search.steps=3', here None"),
        ({"search.order": "first"}, "order is 'first', here 'second'"),
        ({}, "The settings that a row names are equal, so the images or other files differ"),
    ],
)
def test_a_file_of_other_runs_is_refused_with_the_difference(tmp_path, digits, overrides, words):
    there = digits if overrides else replace(digits, fingerprint=Fingerprint.of_name("other"))
    write_results(tmp_path / "runs.csv", [row(recipe(0, **overrides), there)])
    with pytest.raises(InputError, match="has no run of this table") as refused:
        reused_results([tmp_path / "runs.csv"], keyed(0, 1), digits)
    assert words in str(refused.value)


def test_an_empty_file_is_refused(tmp_path, digits):
    write_results(tmp_path / "runs.csv", [])
    with pytest.raises(InputError, match=r"none of its 0 rows .* It is empty\."):
        reused_results([tmp_path / "runs.csv"], keyed(0), digits)


def test_a_run_of_another_table_counts_under_its_arm_here(tmp_path, digits):
    """Tables share runs, in files as in folders."""
    other = row(recipe(0), digits, table="table4", arm="generated and real images")
    report = TableReport("table2", tmp_path, "a title")
    report.add_reused(("LFM-CW", 0), other)
    report.write_so_far()
    (written,) = read_results(report.results)
    assert (written.table, written.arm, written.run) == ("table2", "LFM-CW", "elsewhere")
