"""What a run consists of: the stages of its search, and its phases."""

from __future__ import annotations

from dataclasses import dataclass

from lfmcw_app.recipe import Recipe, Search
from lfmcw_app.search_space.pdarts import PDartsStage, pdarts_stages

__all__ = [
    "METHOD_LABELS",
    "SPACE_LABELS",
    "TRAINING",
    "SearchStage",
    "phases_of",
    "search_stages",
]

SPACE_LABELS = {"darts": "DARTS", "pdarts": "P-DARTS", "pcdarts": "PC-DARTS"}
METHOD_LABELS = {"lfmcw": "LFM-CW", "darts": "no LFM-CW", "random": "random cells"}

TRAINING = "training"
"""The phase that trains the derived network."""


@dataclass(frozen=True, kw_only=True)
class SearchStage:
    """A stage of a search, with its own modules and optimizers: the only one, or P-DARTS's.

    Attributes:
        name: of the phase.
        layers: cells of its supernets.
        skip_dropout: initial dropout on identities.
        drops: what its end drops of each edge; None where the search ends with a genotype.
    """

    name: str
    layers: int
    skip_dropout: float = 0.0
    drops: PDartsStage | None = None


def search_stages(how: Search) -> tuple[SearchStage, ...]:
    """The stages of a search, in their order; none where cells are drawn at random."""
    if how.method == "random":
        return ()
    if how.space != "pdarts":
        return (SearchStage(name="search", layers=how.layers),)

    # P-DARTS: the stages of the method, each with its dropout and a name of its own.
    progressive = how.progressive
    planned = pdarts_stages(how.layers, progressive.added_layers, progressive.dropped_operations)
    return tuple(
        SearchStage(
            name=f"search-{index + 1}",
            layers=stage.layers,
            skip_dropout=rate,
            drops=None if stage.drops_none else stage,
        )
        for index, (stage, rate) in enumerate(zip(planned, progressive.skip_dropout, strict=True))
    )


def phases_of(recipe: Recipe) -> tuple[str, ...]:
    """The names of a run's phases in order: the stages of its search, then the training."""
    return (*(stage.name for stage in search_stages(recipe.search)), TRAINING)
