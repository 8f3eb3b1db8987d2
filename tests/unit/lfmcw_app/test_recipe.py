"""The settings of recipes: their values in presets, and what is refused."""

from __future__ import annotations

import pytest
import yaml

from lfmcw_app.errors import InputError
from lfmcw_app.generators import GAMES
from lfmcw_app.names import PRESETS
from lfmcw_app.recipe import Recipe
from lfmcw_app.recipe_loading import (
    load_recipe,
    parsed_settings,
)


def test_a_second_order_search_in_bfloat16_is_refused():
    with pytest.raises(InputError, match="precision bf16 rounds second derivatives away"):
        load_recipe("smoke", overrides={"search.precision": "bf16", "search.order": "second"})


@pytest.mark.parametrize("preset", PRESETS)
def test_a_recipe_survives_yaml(preset):
    recipe = load_recipe(preset)
    assert Recipe.model_validate(yaml.safe_load(recipe.to_yaml())) == recipe


# Gala and Xie, Tables 6 and 7: hyperparameter → its value in the columns DARTS, P-DARTS, PC-DARTS
# (CIFAR), PC-DARTS (ImageNet).
TABLE_6 = {
    "search.weights.lr": (0.025, 0.025, 0.025, 0.5),
    "search.weights.schedule": ("cosine",) * 4,
    "search.weights.min_lr": (0.001, 0.001, 0.001, 0.005),
    "search.weights.momentum": (0.9,) * 4,
    "search.weights.weight_decay": (3e-4,) * 4,
    "search.architecture.lr": (3e-4, 3e-4, 3e-4, 6e-3),
    "search.architecture.weight_decay": (1e-3,) * 4,
    "search.generator.lr": (2e-4,) * 4,
    "search.generator.discriminator_lr": (2e-4,) * 4,
    "search.generator.name": ("biggan",) * 4,  # section 4.2
    "search.channels": (16,) * 4,
    "search.layers": (8,) * 4,
    "search.weights.grad_clip": (5.0,) * 4,
    "search.batch_size": (64,) * 4,
    "search.epochs": (50, 25, 50, 50),
    "search.lambda": (1.0,) * 4,
    "search.space": ("darts", "pdarts", "pcdarts", "pcdarts"),
}


TABLE_7 = {
    "evaluation.weights.lr": (0.025, 0.025, 0.025, 0.5),
    "evaluation.weights.schedule": ("cosine",) * 4,
    "evaluation.weights.momentum": (0.9,) * 4,
    "evaluation.weights.weight_decay": (3e-4, 3e-4, 3e-4, 3e-5),
    "evaluation.channels": (36, 36, 36, 48),
    "evaluation.layers": (20, 20, 20, 14),
    "evaluation.auxiliary_weight": (0.4,) * 4,
    "evaluation.augmentation.cutout": (16, 16, 16, 0),
    "evaluation.label_smoothing": (0.0, 0.0, 0.0, 0.1),
    "evaluation.drop_path": (0.3, 0.3, 0.3, 0.0),
    "evaluation.weights.grad_clip": (5.0,) * 4,
    "evaluation.batch_size": (96, 96, 96, 1024),
    "evaluation.epochs": (600, 600, 600, 250),
}


COLUMNS = (
    ("darts", "cifar10"),
    ("pdarts", "cifar100"),
    ("pcdarts", "cifar10"),
    ("pcdarts", "imagenet"),
)


@pytest.mark.parametrize(
    "column", range(4), ids=[f"{space} on {dataset}" for space, dataset in COLUMNS]
)
def test_the_paper_recipes_have_the_values_of_its_tables(column):
    space, dataset = COLUMNS[column]
    tree = load_recipe("paper", space=space, overrides={"dataset": dataset}).model_dump(
        by_alias=True
    )
    for key, values in {**TABLE_6, **TABLE_7}.items():
        value = tree
        for part in key.split("."):
            value = value[part]
        assert value == values[column], key
    if space == "pdarts":
        progressive = tree["search"]["progressive"]
        assert list(progressive["added_layers"]) == [0, 6, 12]
        assert list(progressive["skip_dropout"]) == [0.1, 0.4, 0.7]


@pytest.mark.parametrize(
    ("space", "dataset", "values"),
    [
        ("pdarts", "cifar10", {"layers": 5, "batch_size": 96}),
        ("pcdarts", "cifar10", {"batch_size": 256}),
        ("pcdarts", "imagenet", {"batch_size": 1024, "partial_channels": 2}),
    ],
)
def test_the_original_recipes_are_those_of_the_programs(space, dataset, values):
    """The original recipes differ from the paper where the programs do."""
    search = load_recipe("original", space=space, overrides={"dataset": dataset}).search
    assert search.architecture.moves_first
    assert not load_recipe(
        "paper", space=space, overrides={"dataset": dataset}
    ).search.architecture.moves_first
    assert {key: getattr(search, key) for key in values} == values
    assert (
        search.architecture.warmup_epochs
        == {"cifar10": {"pdarts": 10, "pcdarts": 15}[space], "imagenet": 35}[dataset]
    )


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("seed=true", "'seed' must be a whole number, got true"),
        ("search.layers=3.5", "a whole number, got 3.5"),
        ("search.layers='8'", "a whole number, got '8'. Write 8 without quotes"),
        ("search.layers=.inf", "a whole number, got inf"),
        (
            "search.progressive.added_layers=[0, true, 1]",
            "added_layers.1.*a whole number, got true",
        ),
        ("search.weights.lr=true", "a number, got true"),
        ("search.weights.lr='1e-3'", "a number, got '1e-3'. Write 1e-3 without quotes"),
        ("search.weights.grad_clip=None", "a number, got 'None'. To give no value, write null"),
        ("search.weights.lr=.nan", "finite number"),
        ("detect_collapse=1", "true or false, got 1"),
        ("detect_collapse='true'", "true or false, got 'true'"),
        ("detect_collapse=yes", "detect_collapse=yes' cannot be read: line 1: yes is"),
        ("seed=010", "seed=010' cannot be read: line 1: 010 is an octal"),
        ("preset=8", "text, got 8"),
        ("search={steps: 3, steps: 4}", "line 1: the key 'steps' is already in the same section"),
        ("search.steps=1e20", "at most 1,000,000,000, got 1e"),
        ("search.generator.discriminator_steps=1e9", "at most 1,000, got"),
        ("checkpoint_every=1e20", "less than 9,007,199,254,740,992"),
        ("search.layers=1001", "at most 1,000, got"),
        ("search.nodes=65", "at most 64, got 65"),
        ("search.progressive.added_layers=[0, 1, 1001]", "added_layers.2.' must be at most 1,000"),
        (
            "search.progressive.added_layers=[-1001, 0, 0]",
            "added_layers.0.' must be at least -1,000",
        ),
        ("search.progressive.dropped_operations=[3, 2, 0]", "operations.2.' must be at least 1"),
        ("search.progressive.skip_dropout=[0, 0.5, 1.0]", "skip_dropout.2.' must be less than 1"),
        ("search.progressive.skip_dropout=[-0.1, 0, 0]", "skip_dropout.0.' must be at least 0"),
        ("search.augmentation.color_jitter=[-1, 0, 0, 0]", "color_jitter.0.' must be at least 0"),
        ("evaluation.augmentation.color_jitter=[0, 0, 0, 9.0]", "jitter.3.' must be at most 0.5"),
        ("evaluation.augmentation.color_jitter=[0, 0, 0, -0.1]", "jitter.3.' must be at least 0"),
        ("evaluation.augmentation.color_jitter=[0, 0, 0]", "color_jitter' takes 4 values"),
        ("data.search_fractions=[0.5, -0.1]", "must be positive and sum to at most 1"),
    ],
)
def test_values_of_a_wrong_type_are_refused(setting, words):
    with pytest.raises(InputError, match=words):
        load_recipe("smoke", overrides=parsed_settings([setting]))


def test_numbers_have_one_meaning_however_they_are_written():
    settings = ("search.weights.lr=1e-1", "search.layers=4.0", "search.steps=1e3", "seed=0x10",
                "evaluation.drop_path=0", "search.generator.betas=[0, 1e-1]")  # fmt: skip
    recipe = load_recipe("smoke", overrides=parsed_settings(settings))
    assert recipe.search.weights.lr == 0.1
    assert [recipe.search.layers, recipe.search.steps, recipe.seed] == [4, 1000, 16]
    assert type(recipe.search.layers) is int
    assert recipe.evaluation.drop_path == 0.0
    assert recipe.search.generator.betas == (0.0, 0.1)


def test_weights_of_a_generator_are_no_use_to_real_images():
    with pytest.raises(InputError, match=r"generator\.name real there is none"):
        load_recipe(
            "smoke",
            overrides={"search.generator.name": "real", "search.generator.init.run": "runs/one"},
        )


def test_no_package_takes_the_name_of_real_images():
    """Its generator would silently not be used."""
    load_recipe("smoke", overrides={"search.generator.name": "real"})
    GAMES.register("real", GAMES["dcgan"])
    try:
        with pytest.raises(InputError, match="a package brings a generator called real"):
            load_recipe("smoke", overrides={"search.generator.name": "real"})
    finally:
        del GAMES._entries["real"]
