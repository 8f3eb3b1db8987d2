"""Recipes: what they refuse."""

from __future__ import annotations

import copy
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from lfmcw_app.errors import InputError
from lfmcw_app.generators import GAMES
from lfmcw_app.names import PRESETS
from lfmcw_app.plain_yaml import dump_yaml, parse_yaml
from lfmcw_app.plugins import Table
from lfmcw_app.recipe import (
    Recipe,
    _preset_recipe,
    changed_recipe,
    load_recipe,
    parsed_settings,
    preset_recipe,
    validate_recipe,
)
from lfmcw_app.search_space.operations import DARTS_PRIMITIVES
from mlo import engine_from


def test_a_second_order_search_in_bfloat16_is_refused():
    with pytest.raises(InputError, match="precision bf16 rounds second derivatives away"):
        load_recipe("smoke", overrides={"search.precision": "bf16", "search.order": "second"})


@pytest.mark.parametrize("preset", PRESETS)
def test_a_recipe_survives_yaml(preset):
    recipe = load_recipe(preset)
    assert Recipe.model_validate(yaml.safe_load(recipe.to_yaml())) == recipe


def test_options_go_over_the_file_and_the_file_over_the_preset(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("seed: 3\nsearch: {lambda: 0.5, channels: 6}\n")
    recipe = load_recipe("smoke", config=path, overrides={"search.channels": 10})
    assert (recipe.seed, recipe.search.lam, recipe.search.channels, recipe.search.layers) == (
        3,
        0.5,
        10,
        3,
    )


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


def test_a_section_that_stands_twice_in_a_file_is_refused(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("search: {channels: 6}\nseed: 3\nsearch: {layers: 4}\n")
    with pytest.raises(InputError, match=r"c\.yaml cannot be read: line 3: .*'search'.* line 1"):
        load_recipe("smoke", config=path)


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


NAMES = (
    "a #b: c",
    "😀.csv",
    '"q"',
    "it's",
    "back\\slash",
    "{seed}",
    "1e-3",
    "null",
    "yes",
    "- x",
    " ",
    "",
)


@pytest.mark.parametrize("name", NAMES)
def test_text_given_as_a_value_stays_that_text(name):
    recipe = load_recipe("smoke", overrides={"data.groups": name})
    assert recipe.data.groups == name
    assert validate_recipe(parse_yaml(recipe.to_yaml())) == recipe


def test_lists_sections_and_null_can_be_values():
    fractions, shares = (0.25, 0.5), {"cat": 0.5}
    settings = {
        "data": {"search_fractions": fractions},
        "data.class_shares": shares,
        "search.weights.grad_clip": None,
        "search.hypergradient": {"w1": {"name": "neumann"}, "default": "one_step"},
    }
    before = copy.deepcopy(settings)
    recipe = load_recipe("smoke", overrides=settings)
    assert settings == before  # a section that is completed is the recipe's own
    assert (recipe.data.search_fractions, recipe.data.class_shares) == (fractions, shares)
    assert recipe.search.weights.grad_clip is None
    assert validate_recipe(parse_yaml(recipe.to_yaml())) == recipe


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("search.hypergradient", engine_from("neumann")),
        ("search.hypergradient", {"w1": {"name": "neumann", "num_terms": {3}}}),
        ("search.weights.lr", torch.tensor(0.1)),
        ("search.generator.betas", np.array([0.5, 0.9])),
    ],
)
def test_objects_of_a_script_are_no_settings(key, value):
    """They would be written as something else than what is read back."""
    with pytest.raises(InputError, match=rf"'{key}.* A recipe holds text, numbers, true"):
        load_recipe("smoke", overrides={key: value})


@pytest.mark.parametrize(
    ("key", "value", "plain"),
    [
        ("seed", np.int64(3), 3),
        ("search.steps", np.uint8(3), 3),
        ("search.weights.lr", np.float32(0.5), 0.5),
        ("search.weights.lr", np.float64(0.5), 0.5),
        ("search.weights.lr", Fraction(1, 2), 0.5),
        ("search.tf32", np.bool_(True), True),
        ("search.generator.betas", (np.float32(0.5), np.float32(0.25)), [0.5, 0.25]),
        ("search.generator.init.run", Path("runs/one"), "runs/one"),
        ("search.hypergradient", {"w1": {"name": "neumann", "num_terms": np.int64(3)}},
         {"w1": {"name": "neumann", "num_terms": 3}}),
        ("data.class_shares", {np.int64(2): np.float32(0.5)}, {2: 0.5}),
        ("data.groups", np.str_("groups.csv"), "groups.csv"),
    ],
)  # fmt: skip
def test_numbers_and_paths_of_a_script_are_settings(key, value, plain):
    recipe = load_recipe("smoke", overrides={key: value})
    assert recipe.to_yaml() == load_recipe("smoke", overrides={key: plain}).to_yaml()


def test_the_last_of_several_settings_of_a_key_counts():
    assert parsed_settings(["seed=1", "seed=2"]) == {"seed": 2}
    section = ["data.test_images=3", "data={train_images: 8}", "data.test_images=5"]
    data = load_recipe("smoke", overrides=parsed_settings(section)).data
    assert (data.train_images, data.test_images) == (8, 5)


def as_file(section, path):
    path.write_text(f"search: {section}\n")
    return load_recipe("smoke", config=path)


def as_settings(section):
    return load_recipe("smoke", overrides={"search": parse_yaml(section)})


@pytest.mark.parametrize(
    ("section", "single"),
    [
        ("{steps: 2}", {"search.steps": 2}),
        ("{generator: {init: {run: a}, lr: 1e-3}}",
         {"search.generator.init.run": "a", "search.generator.lr": 1e-3}),
        ("{}", {}),
        ("{hypergradient: {name: neumann, num_terms: 3}}",
         {"search.hypergradient": {"name": "neumann", "num_terms": 3}}),
    ],
)  # fmt: skip
def test_a_section_sets_its_keys_by_every_way_that_it_is_given(section, single, tmp_path):
    wanted = load_recipe("smoke", overrides=single)
    assert as_file(section, tmp_path / "c.yaml") == wanted
    assert as_settings(section) == wanted
    assert load_recipe("smoke", overrides=parsed_settings([f"search={section}"])) == wanted
    changed = changed_recipe(load_recipe("smoke"), overrides=parsed_settings([f"search={section}"]))
    assert changed == wanted


def test_sections_that_are_given_twice_are_joined():
    twice = parsed_settings(["search={steps: 2, layers: 4}", "search={channels: 6, layers: 5}"])
    assert twice == {"search.steps": 2, "search.layers": 5, "search.channels": 6}


@pytest.mark.parametrize(
    ("key", "first", "second"),
    [
        ("search.hypergradient", {"name": "neumann", "num_terms": 3}, {"name": "cg"}),
        ("search.hypergradient", {"w1": "neumann"}, {"w2": "cg"}),
        ("data.class_shares", {"cat": 0.5}, {"dog": 0.25}),
    ],
)
def test_mappings_that_are_values_are_replaced_as_a_whole(key, first, second, tmp_path):
    section, name = key.split(".")
    wanted = load_recipe("smoke", overrides={key: second})
    file = tmp_path / "c.yaml"
    file.write_text(dump_yaml({section: {name: first}}))
    assert load_recipe("smoke", config=file, overrides={key: second}) == wanted
    assert load_recipe("smoke", config=file, overrides={section: {name: second}}) == wanted
    assert changed_recipe(load_recipe("smoke", config=file), overrides={key: second}) == wanted


@pytest.mark.parametrize("setting", ["search=5", "search=null", "search.weights=[]"])
def test_a_value_in_the_place_of_a_section_is_refused(setting):
    with pytest.raises(InputError, match="is a section of keys, got"):
        load_recipe("smoke", overrides={"search.order": "first", **parsed_settings([setting])})


@pytest.mark.parametrize("dataset", ["imagenet", "random:imagenet"])
def test_imagenet_has_its_settings_wherever_it_is_named(dataset, tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text(f"dataset: {dataset}")
    named = load_recipe("paper", overrides={"dataset": dataset})
    assert named.search.stem == "imagenet"
    assert load_recipe("paper", config={"dataset": dataset}) == named
    assert load_recipe("paper", config=file) == named
    other = load_recipe("paper", config={"dataset": dataset}, overrides={"dataset": "cifar10"})
    assert other == load_recipe("paper", overrides={"dataset": "cifar10"})


def test_a_space_has_its_settings_wherever_it_is_named():
    named = load_recipe("paper", space="pdarts")
    assert load_recipe("paper", config={"search": {"space": "pdarts"}}) == named
    assert load_recipe("paper", overrides={"search.space": "pdarts"}) == named
    with pytest.raises(InputError, match=r"Unknown search space \[8\]"):
        load_recipe("paper", overrides={"search.space": [8]})


FEW = {
    "search.primitives": ["none", "skip_connect", "sep_conv_3x3", "max_pool_3x3"],
    "search.progressive.added_layers": [0, 1],
    "search.progressive.skip_dropout": [0.1, 0.2],
    "search.progressive.dropped_operations": [1, 1],
}


def test_a_presets_recipe_does_not_depend_on_the_settings():
    recipe = load_recipe("smoke", space="pdarts", overrides={"dataset": "digits", **FEW})
    assert preset_recipe(recipe) == load_recipe("smoke", space="pdarts")
    assert preset_recipe(recipe) is preset_recipe(recipe)  # read once
    assert preset_recipe(Recipe()) is None


def test_a_presets_recipe_asks_no_package(monkeypatch):
    """A package that takes a name of the preset's does not stop runs that do without it."""
    recipe = load_recipe("small", overrides={"search.primitives": ["none", "skip_connect"]})
    _preset_recipe.cache_clear()

    def refuse(table, name):
        raise InputError(f"Several packages have {name}.")

    monkeypatch.setattr(Table, "__getitem__", refuse)
    assert preset_recipe(recipe).search.primitives == DARTS_PRIMITIVES
    with pytest.raises(InputError, match="Several packages"):
        load_recipe("small")


@pytest.mark.parametrize("tree", [{"dataset": "folder:a\udcff"}, {"data": {"groups": "\ud800"}}])
def test_what_no_file_of_text_holds_is_refused(tree):
    with pytest.raises(InputError, match="is no text in UTF-8"):
        validate_recipe(tree)
