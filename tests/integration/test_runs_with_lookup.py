"""Runs and tables whose test errors are looked up: a search, and no training after it."""

from __future__ import annotations

import csv
import json
import shutil

import pytest
from made_cell_tables import write_csv
from tiny_runs import called

from lfmcw_app.cell_table_file import read_cell_table
from lfmcw_app.commands.run import run
from lfmcw_app.commands.table import table
from lfmcw_app.search_space.nasbench201 import SumCell

TINY = (
    "--preset=smoke", "--space=nasbench201", "--threads=1", "--device=cpu", "--set=search.nodes=3",
    "--set=search.channels=4", "--set=search.layers=3", "--set=search.epochs=null",
    "--set=search.steps=2", "--set=search.batch_size=8", "--set=search.generator.channels=2",
    "--set=search.generator.noise_dim=4", "--set=data.search_images=80",
)  # fmt: skip


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    return write_csv(tmp_path_factory.mktemp("tables") / "cells.csv")


def call(command, *arguments):
    done = called(command, *arguments, *TINY)
    return done.returncode, done.words


def result_of(folder, cells):
    """The result of a run, after a comparison with the table."""
    result = json.loads((folder / "result.json").read_text())
    held = read_cell_table(cells)
    cell = SumCell.from_text((folder / "genotype.txt").read_text())
    assert result["test_error_percent"] == pytest.approx(held.error(cell), abs=1e-4)
    assert result["lookup"]["rank"] == held.rank(cell)
    return result


def test_a_search_ends_with_a_look_up(cells, tmp_path):
    out = tmp_path / "run"
    code, said = call(run, "digits", "--method=darts", f"--lookup={cells}", f"--out={out}")
    assert code == 0, said
    result = result_of(out, cells)
    assert f"rank {result['lookup']['rank']} of 125" in said
    phases = {json.loads(line)["phase"] for line in (out / "metrics.jsonl").open()}
    assert phases == {"search"}
    assert not list(out.glob("training*"))
    assert not (out / "network.pt").exists()


def test_a_look_up_needs_no_batch_for_a_training(cells, tmp_path):
    """Settings of the training are not held against the data, as nothing is trained."""
    arguments = ("digits", "--method=random", f"--out={tmp_path / 'run'}")
    large = "--set=evaluation.batch_size=5000"
    code, said = call(run, *arguments, large)
    assert code == 2
    assert "evaluation.batch_size is 5000" in said
    code, said = call(run, *arguments, large, f"--lookup={cells}")
    assert code == 0, said
    assert "epochs instead of" not in said
    result_of(tmp_path / "run", cells)


def test_a_projection_has_no_training(cells):
    code, said = call(run, "digits", "--method=darts", f"--lookup={cells}", "--dry-run")
    assert code == 0, said
    assert "search" in said
    assert "training" not in said.partition("projected")[2]
    code, said = call(run, "digits", "--method=random", f"--lookup={cells}", "--dry-run")
    assert code == 0, said
    assert "Nothing to project" in said


def test_a_table_that_does_not_fit_is_refused_before_reading(cells, tmp_path, monkeypatch):
    monkeypatch.setattr("lfmcw_app.data_checks.reader", lambda: pytest.fail("read"))
    out = tmp_path / "run"
    code, said = call(run, "cifar10", f"--lookup={cells}", f"--out={out}")
    assert code == 2
    assert "errors on digits, but none on 'cifar10'" in said
    assert not out.exists()


@pytest.mark.slow
def test_runs_of_a_table_are_looked_up(cells, tmp_path):
    """Its file has regret and rank; a table of cells that has moved is the same."""
    folders = (f"--out={tmp_path / 't'}", f"--runs={tmp_path / 'runs'}")
    code, said = call(table, "table2", "digits", "--seeds=1", f"--lookup={cells}", *folders)
    assert code == 0, said
    rows = list(csv.DictReader((tmp_path / "t" / "runs.csv").open()))
    assert len(rows) == 2
    for row in rows:
        result = result_of(tmp_path / "runs" / row["run"], cells)
        assert float(row["regret_percent"]) == result["lookup"]["regret_percent"]
        assert int(row["rank"]) == result["lookup"]["rank"]

    moved = tmp_path / "moved.csv"
    shutil.copy(cells, moved)
    (tmp_path / "runs" / rows[0]["run"] / "result.json").unlink()
    code, said = call(table, "table2", "digits", "--seeds=1", f"--lookup={moved}", *folders)
    assert code == 0, said
    assert "2 runs, 1 of them already complete" in said
