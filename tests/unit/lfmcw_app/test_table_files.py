"""The files of a table. Whole tables are tried in tests/integration."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import count

import pytest
import torch
from crash_points import disk_is_full, killed_at, striking

import mlo
from lfmcw_app.data import load_dataset
from lfmcw_app.errors import InputError
from lfmcw_app.fingerprint import Fingerprint, check_unchanged
from lfmcw_app.provenance import made_by
from lfmcw_app.recipe_loading import load_recipe
from lfmcw_app.results_file import read_results
from lfmcw_app.run_folder import RunFolder
from lfmcw_app.table_files import TableReport, claim, run_digest, run_folder, run_path


@pytest.fixture
def digits():
    return load_dataset("digits")


def changed(dataset):
    """The data set with another fingerprint."""
    return replace(dataset, fingerprint=Fingerprint.of_name("other"))


def test_a_recipe_has_one_run_folder(tmp_path, digits):
    first, second = (load_recipe("smoke", overrides={"seed": seed}) for seed in (0, 1))
    assert run_folder(tmp_path, first, digits) == run_folder(tmp_path, first, digits)
    assert run_folder(tmp_path, first, digits) != run_folder(tmp_path, second, digits)
    assert RunFolder.open(run_folder(tmp_path, second, digits)).recipe == second


def test_a_run_has_one_folder_wherever_its_weights_lie(tmp_path, digits):
    """Their digest counts."""

    def placed(run, digest):
        inits = ("search.init", "search.generator.init", "evaluation.init")
        settings = {f"{init}.run": run for init in inits} | {
            f"{init}.digest": digest for init in inits
        }
        return run_path(tmp_path, load_recipe("smoke", overrides=settings), digits)

    assert placed("here", "abc") == placed("there", "abc")
    assert placed("here", "abc") != placed("here", "abd")


def test_a_run_has_one_digest_wherever_its_images_lie(tmp_path, digits):
    """Their fingerprint counts: a table goes on where another machine has the same files."""

    def placed(name):
        return load_recipe("smoke", overrides={"dataset": name})

    one, other = placed("folder:/here/photos"), placed("folder:/there/pictures")
    assert run_digest(one, digits) == run_digest(other, digits)
    assert run_digest(one, digits) != run_digest(one, changed(digits))
    assert run_digest(one, digits) != run_digest(load_recipe("smoke"), digits)
    claim(tmp_path / "table", {"arm": one}, digits)
    claim(tmp_path / "table", {"arm": other}, digits)


def test_tables_of_other_seeds_have_folders_of_their_own(tmp_path, digits):
    claim(tmp_path / "table", {"arm": load_recipe("smoke")}, digits, first_seed=10)
    claim(tmp_path / "table", {"arm": load_recipe("smoke")}, digits, first_seed=10)
    with pytest.raises(InputError, match="a table of other settings"):
        claim(tmp_path / "table", {"arm": load_recipe("smoke")}, digits)


def test_other_data_have_another_run_folder(tmp_path, digits):
    recipe = load_recipe("smoke")
    path = run_folder(tmp_path, recipe, digits)
    assert run_folder(tmp_path, recipe, changed(digits)) != path
    # Written when it is made: the run starts later, and the data may have changed by then.
    check_unchanged(path, digits.fingerprint)
    with pytest.raises(InputError, match="data have changed"):
        check_unchanged(path, changed(digits).fingerprint)


def test_a_folder_holds_one_table(tmp_path, digits):
    claim(tmp_path / "table", {"arm": load_recipe("smoke")}, digits)
    claim(tmp_path / "table", {"arm": load_recipe("smoke", overrides={"seed": 5})}, digits)
    with pytest.raises(InputError, match="a table of other settings"):
        claim(tmp_path / "table", {"arm": load_recipe("small")}, digits)
    with pytest.raises(InputError, match=r"a table of other data \(digits has changed\)"):
        claim(tmp_path / "table", {"arm": load_recipe("smoke")}, changed(digits))


def test_a_kill_at_any_moment_of_its_claim_is_mended(tmp_path, digits):
    recipes = {"arm": load_recipe("smoke")}
    for number in count():
        folder = tmp_path / f"table-{number}"
        if not killed_at(folder, number, lambda folder=folder: claim(folder, recipes, digits)):
            break
        claim(folder, recipes, digits)
    assert number > 2


def test_a_full_disk_costs_a_table_nothing(tmp_path, digits):
    recipe = load_recipe("smoke")
    full = striking(tmp_path / "table", 1, disk_is_full)
    with pytest.raises(InputError, match=r"No space left.*repeat the command"), full:
        claim(tmp_path / "table", {"arm": recipe}, digits)
    claim(tmp_path / "table", {"arm": recipe}, digits)

    report = TableReport("table2", tmp_path / "table", "a title")
    folder = run_folder(tmp_path, recipe, digits)
    RunFolder.open(folder).write("result.json", '{"test_error_percent": 1.5}')
    report.add(("LFM-CW", 0), folder)
    report.write_so_far()
    before = report.results.read_bytes()
    full = striking(tmp_path / "table", 0, disk_is_full)
    with pytest.warns(mlo.CheckpointWarning, match="the next one tries again"), full:
        report.write_so_far()
    full = striking(tmp_path / "table", 0, disk_is_full)
    with pytest.raises(InputError, match="No run is made again"), full:
        report.write()
    assert report.results.read_bytes() == before
    report.write()


def test_runs_without_a_result_are_not_in_the_table(tmp_path, digits):
    folder = run_folder(tmp_path, load_recipe("smoke"), digits)
    report = TableReport("table2", tmp_path, "a title")
    assert not report.add(("LFM-CW", 0), folder)
    RunFolder.open(folder).write("result.json", '{"test_error_percent": 1.5}')
    assert report.add(("LFM-CW", 0), folder)
    assert report.said(("LFM-CW", 0)) == "1.50% test error"


def test_a_table_has_the_results_of_another_command_too(tmp_path, digits):
    folders = {
        ("LFM-CW", seed): run_folder(
            tmp_path, load_recipe("smoke", overrides={"seed": seed}), digits
        )
        for seed in (0, 1, 2)
    }
    report = TableReport("table2", tmp_path, "a title")
    assert report.collect(folders) == list(folders.values())
    for seed in (0, 2):  # one by this command, and one by the other
        RunFolder.open(folders["LFM-CW", seed]).write("result.json", '{"test_error_percent": 1.5}')
    assert report.collect(folders) == [folders["LFM-CW", 1]]
    report.write_so_far()
    assert [row.seed for row in read_results(report.results)] == [0, 2]


def test_a_table_clears_a_run_that_was_stopped_in_its_clearing(tmp_path, digits):
    folder = RunFolder.open(run_folder(tmp_path, load_recipe("smoke"), digits))
    folder.keep = "results"
    folder.complete('{"test_error_percent": 1.5}', made_by(torch.device("cpu")))
    (folder.path / "search.pt").touch()
    assert TableReport("table2", tmp_path, "a title").add(("LFM-CW", 0), folder.path)
    assert not (folder.path / "search.pt").exists()


def test_a_table_has_a_row_per_run_in_the_order_of_its_arms(tmp_path, digits):
    report = TableReport("table2", tmp_path, "a title")
    for label, seed in (("LFM-CW", 1), ("LFM-CW", 0), ("no LFM-CW", 1)):
        folder = run_folder(tmp_path, load_recipe("smoke", overrides={"seed": seed}), digits)
        RunFolder.open(folder).write("result.json", '{"test_error_percent": 1.5}')
        report.add((label, seed), folder)
    report.write_so_far()
    rows = read_results(report.results)
    found = [(row.arm, row.seed) for row in rows]
    assert found == [("no LFM-CW", 1), ("LFM-CW", 0), ("LFM-CW", 1)]
    assert "**Power.**" in report.path.read_text("utf-8")
    assert not (tmp_path / "figure.png").exists()
    report.write()
    assert (tmp_path / "figure.png").stat().st_size > 2000
    assert not list(tmp_path.glob(".*.part*"))
    assert f"copy {report.results} to docs/data/runs/{tmp_path.name}.csv" in report.to_contribute()


def test_a_folder_that_another_table_makes_is_waited_for(tmp_path, digits):
    """Two tables make the same folders at the same time: the second finds them made."""
    recipe = load_recipe("smoke")
    with ThreadPoolExecutor(4) as pool:
        made = [pool.submit(run_folder, tmp_path, recipe, digits) for _ in range(4)]
        assert len({future.result() for future in made}) == 1


def test_a_folder_that_was_made_in_part_is_completed(tmp_path, digits):
    path = run_path(tmp_path, load_recipe("smoke"), digits)
    RunFolder.create(path, load_recipe("smoke"))
    assert run_folder(tmp_path, load_recipe("smoke"), digits) == path
    assert (path / "dataset.json").exists()


def test_a_run_that_keeps_results_only_has_no_pictures(tmp_path, digits):
    path = run_folder(tmp_path, load_recipe("smoke"), digits, keep="results")
    assert not (path / "samples").exists()


def test_a_run_that_was_changed_in_its_middle_is_refused(tmp_path, digits):
    folder = run_folder(tmp_path, load_recipe("smoke"), digits)
    change = {"phase": "search", "round": 3, "key": "search.weights.lr", "old": 0.1, "new": 0.2}
    result = {"test_error_percent": 1.5, "changed": [change]}
    RunFolder.open(folder).write("result.json", json.dumps(result))
    with pytest.raises(InputError, match=r"resumed with other settings \(search\.weights\.lr\)"):
        TableReport("table2", tmp_path, "a title").add(("LFM-CW", 0), folder)
