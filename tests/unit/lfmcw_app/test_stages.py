"""What a run consists of."""

from __future__ import annotations

import pytest

from lfmcw_app.recipe_loading import load_recipe
from lfmcw_app.stages import TRAINING, WARMUP, phases_of, search_stages


def search(space="darts", **changes):
    overrides = {f"search.{key}": value for key, value in changes.items()}
    return load_recipe("paper", space=space, overrides=overrides)


@pytest.mark.parametrize("space", ["darts", "pcdarts"])
def test_a_search_has_one_stage(space):
    (stage,) = search_stages(search(space).search)
    assert (stage.name, stage.layers, stage.skip_dropout, stage.drops) == ("search", 8, 0.0, None)


def test_pdarts_searches_in_stages_that_drop_operations():
    stages = search_stages(search("pdarts", layers=5).search)
    assert [stage.name for stage in stages] == ["search-1", "search-2", "search-3"]
    assert [stage.layers for stage in stages] == [5, 11, 17]
    assert [stage.skip_dropout for stage in stages] == [0.1, 0.4, 0.7]
    assert [stage.drops and stage.drops.drops for stage in stages] == [3, 2, None]


def test_random_cells_have_no_search():
    recipe = search(method="random")
    assert search_stages(recipe.search) == ()
    assert phases_of(recipe) == (TRAINING,)


def test_the_training_is_the_last_phase():
    assert phases_of(search("pdarts", layers=5)) == ("search-1", "search-2", "search-3", TRAINING)


def test_a_warm_up_is_the_first_phase():
    warm = {"generator.warmup_rounds": 5}
    assert phases_of(search(**warm)) == (WARMUP, "search", TRAINING)
    assert phases_of(search(method="darts", **warm)) == ("search", TRAINING)
    assert phases_of(search(method="random", **warm)) == (TRAINING,)
    assert phases_of(search(**warm, **{"generator.name": "real"})) == ("search", TRAINING)


@pytest.mark.parametrize("preset", ["paper", "original"])
@pytest.mark.parametrize("space", ["darts", "pcdarts", "pdarts"])
def test_the_papers_recipes_have_no_warm_up(preset, space):
    assert WARMUP not in phases_of(load_recipe(preset, space=space))
