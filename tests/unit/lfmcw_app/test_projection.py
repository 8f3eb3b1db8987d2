"""What a run will take, from two rounds of each of its phases."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from lfmcw_app.data import load_dataset
from lfmcw_app.projection import Projection, after_projection, project
from lfmcw_app.recipe import load_recipe

MEASURED = [
    Projection(name="search", rounds=1000, seconds=0.36, memory=1.5),
    Projection(name="training", rounds=10, seconds=2.0, memory=2.25),
]


@pytest.fixture
def output():
    return io.StringIO()


@pytest.fixture
def console(output):
    return Console(file=output, width=200)


def test_a_whole_run_is_not_measured(console, output):
    recipe = load_recipe("smoke")

    def never():
        raise AssertionError

    found = after_projection(recipe, never, console, dry_run=False, max_steps=None)
    assert found is recipe
    assert output.getvalue() == ""


def test_a_dry_run_prints_each_phase_and_the_sum(console, output):
    recipe = load_recipe("smoke")
    found = after_projection(recipe, lambda: MEASURED, console, dry_run=True, max_steps=None)
    assert found is None
    text = output.getvalue()
    rows = {line.split()[1]: line.split() for line in text.splitlines() if line.startswith("│")}
    assert rows["search"][3:] == ["1,000", "│", "0.36", "│", "6.0", "min", "│"]
    assert "6.3 min" in text
    assert "peak memory 2.2 GB" in text or "peak memory 2.3 GB" in text


def test_a_trial_has_few_rounds_of_each_phase(console, output):
    recipe = load_recipe("smoke")
    found = after_projection(recipe, lambda: MEASURED, console, dry_run=False, max_steps=3)
    assert (found.search.steps, found.evaluation.steps, found.trial) == (3, 3, True)
    assert "rounds of each phase: 3." in output.getvalue()


def test_every_phase_is_measured():
    small = {
        "search.method": "darts",
        "search.channels": 4,
        "search.nodes": 1,
        "search.steps": 11,
        "search.batch_size": 8,
        "data.search_images": 40,
        "data.train_images": 32,
        "evaluation.channels": 2,
        "evaluation.epochs": 3,
        "evaluation.batch_size": 16,
    }
    recipe = load_recipe("smoke", overrides=small)
    found = project(recipe, load_dataset("digits"), torch.device("cpu"))
    assert [(phase.name, phase.rounds) for phase in found] == [("search", 11), ("training", 6)]
    assert all(phase.seconds > 0 and phase.memory > 0 for phase in found)
