"""What a run will take, from two rounds of each of its phases."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from lfmcw_app import projection
from lfmcw_app.data import load_dataset
from lfmcw_app.projection import (
    Projection,
    _most_costly,
    after_projection,
    planned_phases,
    print_choice,
    project,
    rough_seconds,
)
from lfmcw_app.recipe_loading import load_recipe
from lfmcw_app.search_space.candidates import Candidates

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


def test_phases_are_planned_as_they_take_most():
    """Paths drop as in the last epoch; identities of P-DARTS as in its first."""
    settings = {
        "search.method": "darts",
        "search.nodes": 1,
        "search.batch_size": 8,
        "search.order": "first",
        "search.progressive.added_layers": [0],
        "search.progressive.dropped_operations": [2],
        "search.progressive.skip_dropout": [0.4],
        "evaluation.channels": 2,
        "evaluation.drop_path": 0.3,
    }
    recipe = load_recipe("smoke", space="pdarts", overrides=settings)
    planned = planned_phases(recipe, load_dataset("digits", image_size=8), torch.device("cpu"))
    assert [phase.section for phase in planned] == ["search", "evaluation"]
    search, training = (phase.build().problems for phase in planned)
    assert training["network"].module.drop_probability == 0.3
    dropped = [getattr(m, "skip_drop_probability", None) for m in search["w2"].module.modules()]
    assert 0.4 in dropped
    alone = planned_phases(
        recipe, load_dataset("digits", image_size=8), torch.device("cpu"), searches=False
    )
    assert [phase.name for phase in alone] == ["training"]


@pytest.mark.parametrize("settings", [{}, {"search.method": "darts"}, {"search.method": "random"}])
def test_a_rough_projection_changes_nothing(settings):
    """It builds networks of its own, and leaves the random state as it was."""
    recipe = load_recipe("smoke", overrides={"search.order": "first", **settings})
    dataset = load_dataset("digits", image_size=8)
    before = torch.get_rng_state()
    seconds = rough_seconds(recipe, dataset, torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), before)
    assert seconds > 0
    alone = rough_seconds(recipe, dataset, torch.device("cpu"), searches=False)
    assert alone > 0


def test_a_rough_projection_counts_passes_and_images(monkeypatch):
    """With a second per image and pass, it is the number of passes of all images."""
    monkeypatch.setattr(projection, "_seconds_per_image", lambda *arguments: 1.0)
    settings = {
        "search.order": "first",
        "search.steps": 10,
        "search.batch_size": 8,
        "evaluation": {"epochs": None, "steps": 5, "batch_size": 16},
    }
    dataset = load_dataset("digits", image_size=8)
    for method, passes in (("lfmcw", 8), ("darts", 2), ("random", 0)):
        recipe = load_recipe("smoke", overrides={**settings, "search.method": method})
        seconds = rough_seconds(recipe, dataset, torch.device("cpu"))
        assert seconds == passes * 10 * 8 + 5 * 16


@pytest.mark.parametrize(
    ("name", "preset", "words"),
    [
        (
            "folder:pictures",
            "small",
            "Preset small, chosen because there is no GPU.",
        ),
        ("folder:pictures", "smoke", None),  # a file has named it
        ("folder:pictures", "original", None),
        ("cifar10", "paper", "about 2.0 days. --preset small is a complete experiment"),
        ("digits", "smoke", None),
    ],
)
def test_the_chosen_preset_is_said(console, output, monkeypatch, name, preset, words):
    monkeypatch.setattr(projection, "rough_seconds", lambda *arguments, **options: 172800.0)
    recipe = load_recipe(preset, overrides={"dataset": name})
    dataset = load_dataset("digits")
    print_choice(recipe, dataset, torch.device("cpu"), console, searches=True)
    text = " ".join(output.getvalue().split())
    assert text == "" if words is None else words in text


def test_of_each_edge_the_largest_operations_are_left():
    """Whatever their order; `none` goes first."""
    edges = (
        ("sep_conv_5x5", "none", "skip_connect"),
        ("conv_3x3", "dil_conv_3x3", "noise"),
    )
    left = _most_costly(Candidates(normal=edges, reduction=edges), 2)
    assert left.normal == left.reduction == (("sep_conv_5x5",), ("conv_3x3",))
