"""What a table will take."""

from __future__ import annotations

import io

import torch
from rich.console import Console

from lfmcw_app import table_projection
from lfmcw_app.projection import Projection
from lfmcw_app.recipe_loading import load_recipe
from lfmcw_app.table_projection import ArmProjection, print_table_projection, project_arms

ARMS = [
    ArmProjection(label="old", runs=20, done=5, seconds=120.0),
    ArmProjection(label="new", runs=20, done=20, seconds=0.0),
]


def printed(arms, tests=1, jobs=1):
    output = io.StringIO()
    print_table_projection(arms, tests, jobs, Console(file=output, width=200))
    return output.getvalue()


def cells(text, label):
    row = next(line for line in text.splitlines() if line.startswith(f"│ {label} "))
    return [cell.strip() for cell in row.strip("│").split("│")]


def test_each_arm_and_the_sum_have_what_is_left():
    text = printed(ARMS)
    assert cells(text, "old") == ["old", "20", "5", "2.0 min", "30.0 min"]
    assert cells(text, "new") == ["new", "20", "20", "", ""]
    assert cells(text, "all") == ["all", "40", "25", "", "30.0 min"]
    assert "at a time" not in text
    assert "With 2 at a time, where each has a core: 15.0 min." in printed(ARMS, jobs=2)


def test_what_so_many_seeds_can_see_is_said():
    assert "With 20 seeds and 8 comparisons, a true difference of 0." in printed(ARMS, tests=8)
    few = [ArmProjection(label="old", runs=3, done=0, seconds=1.0)]
    assert "Seeds: 3, which are too few." in printed(few, tests=8)


def test_only_arms_with_runs_to_come_are_measured(monkeypatch):
    measured = []

    def project(recipe, dataset, device):
        measured.append(recipe.seed)
        return [
            Projection(name="search", rounds=10, seconds=0.5, memory=1.0),
            Projection(name="training", rounds=4, seconds=2.0, memory=1.0),
        ]

    monkeypatch.setattr(table_projection, "project", project)
    recipes = {
        label: load_recipe("smoke", overrides={"seed": seed})
        for seed, label in enumerate(("old", "new", "third"))
    }
    found = project_arms(
        recipes, {"old": 2, "new": 3, "third": 0}, 3, dataset=None, device=torch.device("cpu")
    )
    assert measured == [0, 2]
    assert [(arm.label, arm.done, arm.left) for arm in found] == [
        ("old", 2, 13.0),
        ("new", 3, 0.0),
        ("third", 0, 39.0),
    ]
