"""The stages of a run's search, and the phases of a run."""

from __future__ import annotations

from lfmcw_app.recipe import Recipe, Search
from lfmcw_app.spaces import SearchStage, space_named

__all__ = ["METHOD_LABELS", "TRAINING", "WARMUP", "phases_of", "search_stages"]

METHOD_LABELS = {"lfmcw": "LFM-CW", "darts": "search without LFM-CW", "random": "random cells"}

TRAINING = "training"
"""The phase that trains the derived network, unless its error is looked up."""

WARMUP = "generator"
"""The phase that plays the generator's game alone."""


def search_stages(how: Search) -> tuple[SearchStage, ...]:
    """The stages of a search, in order; none if cells are drawn at random."""
    return () if how.method == "random" else space_named(how.space).stages(how)


def phases_of(recipe: Recipe) -> tuple[str, ...]:
    """The names of a run's phases in order: any warm-up, its search's stages, any training."""
    how = recipe.search
    learns = how.method == "lfmcw" and not how.draws_real
    warmup = (WARMUP,) if learns and how.generator.warmup_rounds > 0 else ()
    training = (TRAINING,) if recipe.trains else ()
    return (*warmup, *(stage.name for stage in search_stages(how)), *training)
