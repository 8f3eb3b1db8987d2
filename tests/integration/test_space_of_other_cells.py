"""A space whose cells, genotypes and networks are not DARTS's runs like any other."""

from __future__ import annotations

import json

import pytest
import torch
from one_cell_space import ONE_CELL, OneCell
from tiny_runs import called, settings

from lfmcw_app import load_network
from lfmcw_app.commands import evaluate, report, run
from lfmcw_app.search_space.cell_svg import primitive_label
from lfmcw_app.spaces import SPACES

SMALL = (
    "--preset=smoke", "--seed=1", "--space=one_cell", "--threads=1",
    *settings(**{"search.primitives": None}),
)  # fmt: skip


@pytest.fixture
def one_cell(monkeypatch):
    monkeypatch.setitem(SPACES._entries, "one_cell", ONE_CELL)


def call(command, *args, code=0):
    done = called(command, *args)
    assert done.returncode == code, done.stdout + done.stderr
    return done.words


@pytest.mark.parametrize(
    "method", [pytest.param("lfmcw", marks=pytest.mark.slow), "darts", "random"]
)
def test_a_space_of_other_cells_is_searched_and_trained(method, one_cell, tmp_path):
    folder = tmp_path / "run"
    printed = call(
        run.run, "digits", *SMALL, "--method", method, "--max-steps", 2, "--out", folder,
        "--detect-collapse",
    )  # fmt: skip
    genotype = OneCell.load(folder)
    assert OneCell.from_text((folder / "genotype.txt").read_text()) == genotype
    assert f"{genotype.edges[0]} from the input" in printed
    assert json.loads((folder / "result.json").read_text())["genotype"] == genotype.to_data()
    assert "One cell" in (folder / "cells.png").read_text()

    page = (folder / "report.html").read_text("utf-8")
    assert "One cell space" in page or method == "random"
    assert f"{primitive_label(genotype.edges[0])} from the input" in page
    network, _, names = load_network(folder)
    assert network(torch.zeros(1, 1, 16, 16)).shape == (1, len(names))


def test_what_a_space_of_other_cells_found_can_be_evaluated(one_cell, tmp_path):
    found = tmp_path / "found.txt"
    found.write_text(OneCell(("conv_3x3",) * 6).notation())
    args = (*SMALL, "--max-steps", 1, "--out", tmp_path / "evaluated")
    call(evaluate.evaluate, found, "digits", *args)
    assert OneCell.load(tmp_path / "evaluated").edges == ("conv_3x3",) * 6
    assert "test error" in call(evaluate.evaluate, "--resume", tmp_path / "evaluated")
    assert call(report.report, tmp_path / "evaluated")


def test_a_genotype_of_other_cells_is_refused(one_cell, tmp_path):
    args = (*SMALL, "--out", tmp_path / "evaluated")
    said = call(evaluate.evaluate, "PDARTS", "digits", *args, code=2)
    assert "does not have the cells of One cell" in said


def test_other_cells_have_no_budget(one_cell, tmp_path):
    args = (*SMALL, "--set", "search.budget.parameters=1", "--out", tmp_path / "run")
    assert "search.budget supports only networks of DARTS's cells" in call(
        run.run, "digits", *args, code=2
    )
