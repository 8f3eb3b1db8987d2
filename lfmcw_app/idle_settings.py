"""Settings that were given and have no effect: those of another method, space, generator or data.

They are reported rather than refused, since one configuration file may be used by several commands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lfmcw_app.errors import listed
from lfmcw_app.names import FOLDER
from lfmcw_app.recipe import Recipe
from lfmcw_app.recipe_loading import preset_recipe, read_config
from lfmcw_app.resuming import leaves

__all__ = ["RULES", "idle_settings"]


@dataclass(frozen=True, kw_only=True)
class Idle:
    """Settings that change nothing under a condition.

    Attributes:
        keys: dotted, of settings or whole sections.
        where: whether the condition holds, of a recipe and of whether there is a search.
        why: what they are for, as the end of a sentence.
        but: those among them that have their effect.
    """

    keys: tuple[str, ...]
    where: Callable[[Recipe, bool], bool]
    why: str
    but: tuple[str, ...] = ()

    def covers(self, key: str) -> bool:
        """Whether a dotted key is one of these settings."""
        return _within(key, self.keys) and not _within(key, self.but)


def _within(key: str, sections: tuple[str, ...]) -> bool:
    return any(f"{key}.".startswith(f"{section}.") for section in sections)


OF_CELLS = ("search.method", "search.space", "search.nodes", "search.primitives")
OF_W1 = (
    "search.lambda", "search.class_weighting", "search.absent_class", "search.validation_batch",
    "search.gradient_terms_every", "search.generator",
)  # fmt: skip

RULES: tuple[Idle, ...] = (
    Idle(
        keys=("search", "detect_collapse", "data.search_images", "data.search_fractions"),
        where=lambda recipe, searches: not searches,
        why="the genotype is given, and nothing is searched",
        but=("search.space", "search.nodes", "search.primitives"),  # of random cells
    ),
    Idle(
        keys=("search", "detect_collapse", "data.search_images", "data.search_fractions"),
        where=lambda recipe, searches: searches and recipe.search.method == "random",
        why="the method random draws the cells by the seed, and searches nothing",
        but=OF_CELLS,
    ),
    Idle(
        keys=OF_W1,
        where=lambda recipe, searches: searches and recipe.search.method == "darts",
        why="the method darts has neither W1 nor a generator",
    ),
    Idle(
        keys=("search.generator",),
        where=lambda recipe, searches: searches and recipe.search.draws_real,
        why="real images are drawn in the place of generated ones",
        but=("search.generator.name", "search.generator.quality", "search.generator.init"),
    ),
    Idle(
        keys=("search.generator.lr",),
        where=lambda recipe, searches: searches and _plays(recipe) and _is_warm(recipe),
        why="the generator begins warm, and has search.generator.warmed_lr",
    ),
    Idle(
        keys=("search.generator.warmed_lr",),
        where=lambda recipe, searches: searches and _plays(recipe) and not _is_warm(recipe),
        why="the generator has neither a warm-up nor search.generator.init",
    ),
    Idle(
        keys=tuple(
            f"search.generator.warmup_{name}"
            for name in (
                "batch_size",
                "lr",
                "discriminator_lr",
                "betas",
                "discriminator_channels",
                "augmentation",
            )
        ),
        where=lambda recipe, searches: (
            searches and _plays(recipe) and not recipe.search.generator.warmup_rounds
        ),
        why="there is no warm-up: search.generator.warmup_rounds is 0",
    ),
    Idle(
        keys=("search.partial_channels",),
        where=lambda recipe, searches: _searches(recipe, searches) and _space(recipe) != "pcdarts",
        why="only the space pcdarts has partial channels",
    ),
    Idle(
        keys=("search.progressive",),
        where=lambda recipe, searches: _searches(recipe, searches) and _space(recipe) != "pdarts",
        why="only the space pdarts has stages",
    ),
    Idle(
        keys=("search.hypergradient",),
        where=lambda recipe, searches: (
            _searches(recipe, searches) and recipe.search.order == "first"
        ),
        why="the first order drops all implicit terms",
    ),
    Idle(
        keys=("search.budget.weight",),
        where=lambda recipe, searches: (
            _searches(recipe, searches)
            and (recipe.search.budget.parameters, recipe.search.budget.multiply_adds)
            == (None, None)
        ),
        why="neither parameters nor multiply-adds are limited",
    ),
    Idle(
        keys=("evaluation", "data.train_images", "data.test_images"),
        where=lambda recipe, searches: not recipe.trains,
        why="the error of the network is looked up, and nothing is trained",
    ),
    Idle(
        keys=("evaluation.min_steps",),
        where=lambda recipe, searches: recipe.trains and recipe.evaluation.steps is not None,
        why="evaluation.steps says how many rounds there are",
    ),
    Idle(
        keys=("data.conditions_apply_to",),
        where=lambda recipe, searches: not recipe.data.has_conditions,
        why="no labels are made wrong, and no classes small",
    ),
    Idle(
        keys=("data.in_memory",),  # others of files are refused where the data are read
        where=lambda recipe, searches: not recipe.dataset.startswith(FOLDER),
        why="only images of a folder are read from files",
    ),
)
"""What has no effect where; for each setting, the first rule that holds is reported."""


def idle_settings(
    recipe: Recipe,
    *,
    config: Path | None = None,
    given: Iterable[str] = (),
    order: str | None = None,
    searches: bool = True,
) -> list[str]:
    """Says which of the settings that were given change nothing, a sentence for each reason.

    Of a configuration file those count that differ from the preset: a file of --print-config has
    all of them.

    Args:
        recipe: what they were made into.
        config: the file.
        given: dotted keys of single settings.
        order: of --order, if it was given.
        searches: whether there is a search, not only the training of a given genotype.
    """
    of_option = [] if order is None else ["search.order"]
    of_file = [] if config is None else _differing(recipe, read_config(config))
    sections = (*given, *of_option, *of_file)
    keys = dict.fromkeys(key for section in sections for key in _leaves_of(section, recipe))
    idle: dict[str, list[str]] = {}
    for key in keys:
        why = next(
            (rule.why for rule in RULES if rule.covers(key) and rule.where(recipe, searches)), None
        )
        if why is not None:
            idle.setdefault(why, []).append(key)
    return [
        f"{listed(found)} change{'s' if len(found) == 1 else ''} nothing here: {why}."
        for why, found in idle.items()
    ]


def _differing(recipe: Recipe, tree: Mapping[str, Any]) -> list[str]:
    """The settings of a file that are not the preset's."""
    preset = preset_recipe(recipe)
    usual = dict(leaves(preset.model_dump(mode="json", by_alias=True))) if preset else {}
    return [key for key, value in leaves(tree) if key not in usual or usual[key] != value]


def _leaves_of(section: str, recipe: Recipe) -> Iterator[str]:
    """The settings of a section that was given as a whole, or the setting itself."""
    known = (key for key, _ in leaves(recipe.model_dump(mode="json", by_alias=True)))
    yield from (key for key in known if _within(key, (section,)))


def _searches(recipe: Recipe, searches: bool) -> bool:
    return searches and recipe.search.method != "random"


def _plays(recipe: Recipe) -> bool:
    """Whether there is a game of a generator and a discriminator."""
    return recipe.search.method == "lfmcw" and not recipe.search.draws_real


def _is_warm(recipe: Recipe) -> bool:
    return recipe.search.generator.begins_warm


def _space(recipe: Recipe) -> str:
    return recipe.search.space
