"""The tables of the paper and of its controls: what each compares, and the recipes of its runs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lfmcw_app.errors import InputError
from lfmcw_app.recipe import Recipe, Search
from lfmcw_app.recipe_loading import merged_settings, parsed_settings, preset_recipe, with_options
from lfmcw_app.resolving import resolve_recipe

__all__ = [
    "TABLES",
    "Arm",
    "arm_recipe",
    "check_arms",
    "check_settings",
    "contrasts",
    "table_recipes",
]


@dataclass(frozen=True, kw_only=True)
class Arm:
    """What a table compares.

    Attributes:
        settings: recipe key → value.
        length: factor on the recipe's epochs or steps of search.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    length: float = 1.0


EQUAL_TIME = 4.0
"""LFM-CW takes 3.75 times as long as a first-order DARTS search in the paper, 3 to 5 times here."""

TABLES: dict[str, dict[str, Arm]] = {
    "table2": {
        "no LFM-CW": Arm(settings={"search.method": "darts"}),
        "LFM-CW": Arm(settings={"search.method": "lfmcw"}),
    },
    "table4": {
        "generated images only": Arm(settings={"search.synthetic_only": True}),
        "generated and real images": Arm(settings={"search.synthetic_only": False}),
    },
    "table5": {
        "DCGAN": Arm(settings={"search.generator.name": "dcgan"}),
        "WGAN-GP": Arm(settings={"search.generator.name": "wgan_gp"}),
        "BigGAN": Arm(settings={"search.generator.name": "biggan"}),
    },
    "fig3": {
        f"λ = {value:g}": Arm(settings={"search.lambda": value})
        for value in (0.0, 0.1, 0.5, 1.0, 2.0, 3.0)
    },
    "controls": {
        "LFM-CW": Arm(settings={"search.method": "lfmcw"}),
        "random cells": Arm(settings={"search.method": "random"}),
        "no LFM-CW": Arm(settings={"search.method": "darts"}),
        "no LFM-CW, 4 times the rounds": Arm(
            settings={"search.method": "darts"}, length=EQUAL_TIME
        ),
        "λ = 0": Arm(settings={"search.lambda": 0.0}),
        "uniform class weights": Arm(settings={"search.class_weighting": "uniform"}),
    },
    "ablation": {
        "no LFM-CW": Arm(settings={"search.method": "darts"}),
        "LFM-CW": Arm(settings={"search.method": "lfmcw"}),
        "λ = 0": Arm(settings={"search.lambda": 0.0}),
        "uniform class weights": Arm(settings={"search.class_weighting": "uniform"}),
        "synthetic only": Arm(settings={"search.synthetic_only": True}),
        "random cells": Arm(settings={"search.method": "random"}),
    },
}
"""Table → label → arm, the baseline of the comparison first."""

FURTHER_CONTRASTS = {
    "ablation": (
        ("LFM-CW", "uniform class weights"),
        ("LFM-CW", "λ = 0"),
        ("LFM-CW", "random cells"),
    ),
}
"""Table → pairs of arms to compare besides those with the baseline; each asks its own question."""


def contrasts(name: str) -> list[tuple[str, str]]:
    """The comparisons of a table, each an arm and what it is compared with.

    Every arm is compared with the first one. All of them are one family of tests: if all arms are
    alike, at most 5% of tables say "better" or "worse" anywhere.
    """
    baseline, *others = TABLES[name]
    return [*((label, baseline) for label in others), *FURTHER_CONTRASTS.get(name, ())]


def arm_recipe(
    arm: Arm,
    dataset: str,
    preset: str | None,
    config: Path | None,
    assign: Sequence[str],
    seed: int,
    *,
    space: str | None,
    order: str | None,
    settings: Mapping[str, Any] | None = None,
) -> Recipe:
    """The recipe of a run of an arm.

    Args:
        arm: what is compared.
        dataset: its name.
        preset: of the option --preset; None if not given.
        config: of --config.
        assign: of --set: texts key=value, in which {seed} stands for the seed.
        seed: of the run.
        space: of --space.
        order: of --order.
        settings: dotted key → value of other options, taken as they are.
    """
    of_seed = parsed_settings(text.replace("{seed}", str(seed)) for text in assign)
    given = merged_settings(with_options(of_seed, settings or {}), arm.settings)
    recipe = resolve_recipe(dataset, preset, config, given, seed, space=space, order=order)
    if arm.length == 1.0:
        return _without_what_is_unused(recipe)

    # The length is known only here: the preset says how many epochs or steps the search has.
    how = recipe.search
    longer = {"search.epochs": (how.epochs or 0) * arm.length}
    if how.steps:
        longer = {"search.steps": round(how.steps * arm.length)}
    given = merged_settings(given, longer)
    recipe = resolve_recipe(dataset, preset, config, given, seed, space=space, order=order)
    return _without_what_is_unused(recipe)


def table_recipes(
    name: str,
    dataset: str,
    preset: str | None,
    config: Path | None,
    assign: Sequence[str],
    seeds: Iterable[int],
    *,
    space: str | None,
    order: str | None,
    settings: Mapping[str, Any] | None = None,
) -> dict[tuple[str, int], Recipe]:
    """The recipes of a table's runs, by arm and seed.

    They come seed by seed, so that the arms of an unfinished table have equal numbers of runs.

    Args:
        name: one of `TABLES`.
        dataset: of all runs; it and the following are as in `arm_recipe`.
        preset: of --preset.
        config: of --config.
        assign: of --set.
        seeds: of each arm's searches.
        space: of --space.
        order: of --order.
        settings: of other options.

    Raises:
        InputError: if a setting cannot be used, or makes two arms the same.
    """
    check_settings(name, assign)
    recipes = {
        (label, seed): arm_recipe(
            arm, dataset, preset, config, assign, seed, space=space, order=order, settings=settings
        )
        for seed in seeds
        for label, arm in TABLES[name].items()
    }
    check_arms(name, recipes)
    return recipes


OF_GENERATED_IMAGES = (
    "generator", "lam", "class_weighting", "absent_class", "validation_batch", "synthetic_only",
)  # fmt: skip


def _without_what_is_unused(recipe: Recipe) -> Recipe:
    """The recipe with the preset's values for settings that its search does not read or use.

    So the tables of several generators share the runs of such searches, which have one recipe. With
    λ = 0 the generator plays its game, but nothing depends on it, and it is not warmed up.
    """
    how = recipe.search
    preset = preset_recipe(recipe)
    if (how.method == "lfmcw" and how.lam > 0) or preset is None:
        return recipe
    usual = preset.search
    if how.method == "random":
        kept = {name: getattr(how, name) for name in _read_by_random(how, usual)}
        return recipe.model_copy(update={"search": usual.model_copy(update=kept)})
    unused = {name: getattr(usual, name) for name in OF_GENERATED_IMAGES}
    if how.method == "lfmcw":
        unused["lam"] = how.lam
        # Its pictures change nothing, so they need no warm-up and no measurement.
        of_no_use = {"warmup_rounds": 0, "quality": "never"}
        unused["generator"] = usual.generator.model_copy(update=of_no_use)
    return recipe.model_copy(update={"search": how.model_copy(update=unused)})


def _read_by_random(how: Search, usual: Search) -> tuple[str, ...]:
    """The keys of `search` that decide a random cell or its record.

    They include P-DARTS's stages, which must fit the primitives and the layers.
    """
    read = ("method", "space", "nodes", "primitives", "budget", "progressive")
    return read if how.progressive == usual.progressive else (*read, "layers")


def check_settings(name: str, assign: Sequence[str]) -> None:
    """Refuses settings of what a table varies."""
    owned = {"seed", *(key for arm in TABLES[name].values() for key in arm.settings)}
    for assignment in assign:
        if not owned.isdisjoint(parsed_settings([assignment.replace("{seed}", "0")])):
            raise InputError(
                f"{name} sets {', '.join(sorted(owned))} itself; drop --set {assignment}."
            )


def check_arms(name: str, recipes: Mapping[tuple[str, int], Recipe]) -> None:
    """Refuses settings that leave nothing to compare."""
    first = next(iter(recipes.values()))
    if name in ("table4", "table5", "fig3") and first.search.method != "lfmcw":
        raise InputError(
            f"{name} compares settings of LFM-CW; search.method must be lfmcw, got "
            f"{first.search.method!r}."
        )

    # Two arms with one recipe would be one run, compared with itself.
    known: dict[str, str] = {}
    for (label, _), recipe in recipes.items():
        same = known.setdefault(recipe.to_yaml(), label)
        if same != label:
            raise InputError(
                f"With these settings the arms {same!r} and {label!r} of {name} are the same "
                "search."
            )
