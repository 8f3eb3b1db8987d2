"""The result of a run, printed."""

from __future__ import annotations

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from lfmcw_app.result import edge_names, print_result
from lfmcw_app.search_space.genotype import random_genotype

RESULT = {
    "test_error_percent": 12.345,
    "test_images": 1000,
    "dataset": "digits",
    "parameters": 12_345,
    "multiply_adds_millions": 1234.5,
    "seed": 7,
    "genotype": random_genotype(2, 0).to_data(),
}


def printed(path, **more):
    output = io.StringIO()
    console = Console(file=output, width=200, force_terminal=False)
    print_result({**RESULT, **more}, SimpleNamespace(path=path), console)
    return output.getvalue()


def test_edges_are_told_in_words():
    found = edge_names([["skip_connect", 0], ["sep_conv_3x3", 1], ["max_pool_3x3", 3]])
    assert found == [
        "skip_connect from c(k-2)", "sep_conv_3x3 from c(k-1)", "max_pool_3x3 from node 1",
    ]  # fmt: skip


def test_the_result_is_told_with_its_cells(tmp_path):
    text = printed(tmp_path)
    assert "test error 12.35% on 1,000 images of digits" in text
    assert "12,345 parameters, 1,234.5 M multiply-adds, seed 7" in text
    for node in RESULT["genotype"]["normal"] + RESULT["genotype"]["reduction"]:
        assert all(name in text for name in edge_names(node))


def test_the_result_says_whether_a_budget_is_met(tmp_path):
    budget = {
        "parameters": {"limit": 0.5, "actual": 0.4567, "met": True},
        "multiply_adds": {"limit": 100.0, "actual": 123.456, "met": False},
    }
    text = printed(tmp_path, budget=budget)
    assert "budget met: 0.4567 of at most 0.5 million parameters" in text
    assert "budget not met: 123.5 of at most 100 million multiply-adds" in text
    assert "budget" not in printed(tmp_path)


@pytest.mark.parametrize("present", [[], ["cells.png", "report.html"]])
def test_files_are_listed_that_are_there(tmp_path, present):
    for name in present:
        (tmp_path / name).touch()
    last = printed(tmp_path).splitlines()[-1]
    assert last.endswith(": " + ", ".join([*sorted(present, reverse=True), "result.json"]))


def test_what_is_done_next_with_a_network_is_told(tmp_path):
    (tmp_path / "network.pt").touch()
    *_, files, use = printed(tmp_path).splitlines()
    assert files.endswith(": network.pt, result.json")
    assert f"python -m lfmcw_app.predict {tmp_path} IMAGE..." in use
