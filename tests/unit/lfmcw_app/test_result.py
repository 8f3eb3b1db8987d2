"""The result of a run, printed."""

from __future__ import annotations

import io
import json
from types import SimpleNamespace

import pytest
from rich.console import Console

from lfmcw_app.recipe_loading import load_recipe
from lfmcw_app.result import as_json, edge_names, print_result
from lfmcw_app.search_space.genotype import Genotype, random_genotype

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
    print_result(
        {**RESULT, **more}, SimpleNamespace(path=path, recipe=load_recipe("smoke")), console
    )
    return output.getvalue()


def test_edges_are_told_in_words():
    found = edge_names([["skip_connect", 0], ["sep_conv_3x3", 1], ["max_pool_3x3", 3]], Genotype)
    assert found == [
        "skip_connect from c(k-2)", "sep_conv_3x3 from c(k-1)", "max_pool_3x3 from node 1",
    ]  # fmt: skip


def test_the_result_is_told_with_its_cells(tmp_path):
    text = printed(tmp_path)
    assert (
        "test error 12.35% (123 of 1,000; 95% interval 10.4 to 14.5%) on images of digits" in text
    )
    assert "12,345 parameters, 1,234.5 M multiply-adds, seed 7" in text
    for node in RESULT["genotype"]["normal"] + RESULT["genotype"]["reduction"]:
        assert all(name in text for name in edge_names(node, Genotype))


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


def entry(name, error, images=10):
    return {"name": name, "images": images, "error_percent": error, "interval_percent": [0.0, 50.0]}


def test_the_worst_classes_are_named(tmp_path):
    """Three of them, as they are called; none that has no error, or no test image."""
    classes = [entry("[red]a", 10.0), entry("$b", 40.0), entry("c", 0.0), entry("猫", 30.0, 1234)]
    text = printed(tmp_path, classes=classes)
    assert (
        "largest errors by class: $b (4 of 10 wrong), 猫 (370 of 1,234 wrong), "
        "[red]a (1 of 10 wrong); chance alone can explain these"
    ) in text
    more = [*classes, entry("d", 50.0), entry("e", None, 0)]
    text = printed(tmp_path, classes=more)
    assert "by class: d (5 of 10 wrong), $b (4 of 10 wrong), 猫 (370 of 1,234 wrong)" in text
    hard = [entry("a", 60.0, 50), entry("b", 0.0, 50), entry("c", 2.0, 50)]
    text = printed(tmp_path, classes=hard)
    assert "largest errors by class: a (30 of 50 wrong), c (1 of 50 wrong)\n" in text
    assert "by class" not in printed(tmp_path, classes=[entry("a", 10.0), entry("b", 20.0)])
    assert "by class" not in printed(tmp_path, classes=[entry(name, 0.0) for name in "abc"])


def test_a_doubt_is_told_with_the_result(tmp_path):
    assert "Doubtful: [bold]Why?" in printed(tmp_path, doubt="[bold]Why?")
    assert "Doubtful" not in printed(tmp_path)


def test_a_collapsed_generator_is_told_with_the_result(tmp_path):
    doubts = ["The generator has collapsed.", "[bold]No class."]
    text = printed(tmp_path, generator={"gan_test": 10.0, "doubts": doubts})
    assert "Generator: The generator has collapsed.\nGenerator: [bold]No class." in text
    for found in ({"gan_test": 10.0}, None):
        assert "Generator:" not in printed(tmp_path, generator=found)


def test_an_error_of_one_training_is_no_mean(tmp_path):
    found = {
        "file": "t.csv", "dataset": "digits", "seeds": [0], "regret_percent": 1.0, "rank": 2,
        "cells": 9, "best_cell": "|a|",
    }  # fmt: skip
    assert "looked up in t.csv (one training)" in printed(tmp_path, lookup=found)
    found["seeds"] = [0, 1]
    assert "looked up in t.csv (mean of 2 trainings)" in printed(tmp_path, lookup=found)


def test_a_result_is_written_a_line_per_class():
    result = {
        **RESULT,
        "classes": [entry("猫", 1.0), entry('"', 2.0)],
        "confusion": [[1, 0], [2, 3]],
    }
    text = as_json(result)
    assert json.loads(text) == result
    assert "  [2, 3]\n ]" in text
    assert sum("interval_percent" in line for line in text.splitlines()) == 2
