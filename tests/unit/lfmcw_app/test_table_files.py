"""The files of a table. Whole tables are tried in tests/integration."""

from __future__ import annotations

import json

import pytest

from lfmcw_app.errors import InputError
from lfmcw_app.recipe import load_recipe
from lfmcw_app.run_folder import RunFolder
from lfmcw_app.table_files import TableReport, claim, run_folder


def test_a_recipe_has_one_run_folder(tmp_path):
    first, second = (load_recipe("smoke", overrides={"seed": seed}) for seed in (0, 1))
    assert run_folder(tmp_path, first) == run_folder(tmp_path, first)
    assert run_folder(tmp_path, first) != run_folder(tmp_path, second)
    assert RunFolder.open(run_folder(tmp_path, second)).recipe == second


def test_a_folder_holds_one_table(tmp_path):
    claim(tmp_path / "table", {"arm": load_recipe("smoke")})
    claim(tmp_path / "table", {"arm": load_recipe("smoke", overrides={"seed": 5})})
    with pytest.raises(InputError, match="a table of other settings"):
        claim(tmp_path / "table", {"arm": load_recipe("small")})


def test_runs_without_a_result_are_not_in_the_table(tmp_path):
    folder = run_folder(tmp_path, load_recipe("smoke"))
    report = TableReport("table2", tmp_path, "a title")
    assert not report.add(("LFM-CW", 0), folder)
    RunFolder.open(folder).write("result.json", '{"test_error_percent": 1.5}')
    assert report.add(("LFM-CW", 0), folder)
    assert report.error(("LFM-CW", 0)) == 1.5


def test_a_run_that_was_changed_in_its_middle_is_refused(tmp_path):
    folder = run_folder(tmp_path, load_recipe("smoke"))
    change = {"phase": "search", "round": 3, "key": "search.weights.lr", "old": 0.1, "new": 0.2}
    result = {"test_error_percent": 1.5, "changed": [change]}
    RunFolder.open(folder).write("result.json", json.dumps(result))
    with pytest.raises(InputError, match=r"resumed with other settings \(search\.weights\.lr\)"):
        TableReport("table2", tmp_path, "a title").add(("LFM-CW", 0), folder)
