"""How recipes are made from presets, files and single settings, and what these refuse."""

from __future__ import annotations

import copy
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from lfmcw_app.errors import InputError
from lfmcw_app.plain_yaml import dump_yaml, parse_yaml
from lfmcw_app.plugins import Table
from lfmcw_app.recipe import Recipe
from lfmcw_app.recipe_loading import (
    _preset_recipe,
    changed_recipe,
    load_recipe,
    parsed_settings,
    preset_recipe,
    validate_recipe,
)
from lfmcw_app.search_space.operations import DARTS_PRIMITIVES
from mlo import engine_from


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


def test_a_section_that_stands_twice_in_a_file_is_refused(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("search: {channels: 6}\nseed: 3\nsearch: {layers: 4}\n")
    with pytest.raises(InputError, match=r"c\.yaml cannot be read: line 3: .*'search'.* line 1"):
        load_recipe("smoke", config=path)


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
    "text",
    [
        "search.steps: 7\nsearch: {steps: 8}\n",
        "search: {steps: 8}\nsearch.steps: 7\n",
        "search: {weights.lr: 1e-3, weights: {lr: 1e-2}}\n",
        "search.weights: {lr: 1e-3}\nsearch: {weights: {lr: 1e-2}}\n",
    ],
)
def test_two_values_of_one_setting_in_one_place_are_refused(text, tmp_path):
    """By a dotted name and within a section: which of them counts would depend on their order."""
    file = tmp_path / "c.yaml"
    file.write_text(text)
    for given in ({"config": file}, {"overrides": parse_yaml(text)}):
        with pytest.raises(InputError, match=r"search\.(steps|weights\.lr) is .* drop one"):
            load_recipe("smoke", **given)


def test_one_value_of_a_setting_may_be_given_twice():
    given = {"search.steps": 7, "search": {"steps": 7, "layers": 4}}
    search = load_recipe("smoke", overrides=given).search
    assert (search.steps, search.layers) == (7, 4)


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


def test_names_that_python_reads_otherwise_are_no_fault(monkeypatch):
    """As with LC_ALL=C PYTHONUTF8=0: the name is text, but not to this process."""
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    with pytest.raises(InputError, match=r"set PYTHONUTF8=1 \(Python reads .* as ascii here\)"):
        validate_recipe({"dataset": "folder:caf\udcc3\udca9"})
