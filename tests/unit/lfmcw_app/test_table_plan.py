"""Plans of tables: their runs, and which of them have a result already."""

from __future__ import annotations

from pathlib import Path

import pytest

from lfmcw_app.arms import table_recipes
from lfmcw_app.errors import InputError
from lfmcw_app.run_files import RESULT
from lfmcw_app.table_files import run_path
from lfmcw_app.table_plan import plan_table


def recipes(*seeds, assign=()):
    return table_recipes("table2", "digits", "smoke", None, assign, seeds, space=None, order=None)


def plan(runs, planned, tell=lambda _: None):
    return plan_table("table2", planned, runs=runs, reuse=(), data=Path("data"), tell=tell)


def test_the_runs_come_seed_by_seed():
    baseline, ours = (label for label, seed in recipes(3))
    assert list(recipes(3, 4)) == [(baseline, 3), (ours, 3), (baseline, 4), (ours, 4)]


def test_a_plan_knows_what_is_there_already(tmp_path):
    said = []
    planned = plan(tmp_path, recipes(3, 4), said.append)
    assert planned.complete == frozenset()
    assert "1,797 images" in said[0]
    assert (planned.first_seed, planned.title) == (3, "table2, digits, preset smoke")
    assert [recipe.seed for recipe in planned.arms.values()] == [3, 3]

    done = list(planned.recipes)[2]
    folder = run_path(tmp_path, planned.recipes[done], planned.images)
    folder.mkdir()
    (folder / RESULT).write_text("{}")
    again = plan(tmp_path, recipes(3, 4))
    assert again.complete == {done}
    assert again.made == {done[0]: 1}


def test_starting_weights_are_checked_only_of_runs_to_come(tmp_path, monkeypatch):
    """A run that has begun holds its weights, and one with a result needs none."""
    checked = []

    def check(recipe, images):
        checked.append(recipe.seed)
        raise InputError("other classes")

    planned = plan(tmp_path, recipes(0, 1))
    monkeypatch.setattr("lfmcw_app.table_plan.check_generator_fits", check)
    for (_, seed), recipe in planned.recipes.items():
        if seed == 0:
            folder = run_path(tmp_path, recipe, planned.images)
            folder.mkdir()
            (folder / "search.pt").touch()
    with pytest.raises(InputError, match="other classes"):
        plan(tmp_path, recipes(0, 1))
    assert checked == [1]
