"""Settings that change nothing are told with the reason, and others are not."""

from __future__ import annotations

import pytest

from lfmcw_app.idle_settings import RULES, idle_settings
from lfmcw_app.recipe import Recipe
from lfmcw_app.recipe_loading import load_recipe, parsed_settings
from lfmcw_app.resuming import leaves

KEYS = [key for key, _ in leaves(Recipe().model_dump(mode="json", by_alias=True))]


def told(*assignments, searches=True, space="darts", dataset="digits", **more):
    """What is told of assignments; the method and the like come as keywords with double dashes."""
    context = {name.replace("__", "."): value for name, value in more.items()}
    given = parsed_settings(assignments)
    recipe = load_recipe("smoke", space=space, overrides={"dataset": dataset, **context, **given})
    return idle_settings(recipe, given=given, searches=searches)


@pytest.mark.parametrize(
    ("assignment", "context", "why"),
    [
        ("search.channels=8", {"search__method": "random"}, "draws the cells by the seed"),
        ("detect_collapse=true", {"search__method": "random"}, "draws the cells by the seed"),
        ("search.weights.lr=0.1", {"searches": False}, "the genotype is given"),
        ("search.lambda=2", {"search__method": "darts"}, "neither W1 nor a generator"),
        ("search.generator.lr=0.1", {"search__method": "darts"}, "neither W1 nor a generator"),
        ("search.generator.lr=0.1", {"search__generator__name": "real"}, "real images are drawn"),
        ("search.generator.lr=0.1", {"search__generator__warmup_rounds": 2}, "begins warm"),
        ("search.generator.warmed_lr=0.1", {}, "neither a warm-up nor"),
        ("search.generator.warmup_batch_size=4", {}, "there is no warm-up"),
        ("search.partial_channels=2", {}, "only the space pcdarts"),
        ("search.partial_channels=2", {"space": "nasbench201"}, "only the space pcdarts"),
        ("search.progressive.max_skips=1", {"space": "pcdarts"}, "only the space pdarts"),
        ("search.hypergradient=cg", {"search__order": "first"}, "drops all implicit terms"),
        ("search.budget.weight=2", {}, "neither parameters nor multiply-adds"),
        ("evaluation.channels=8", {"lookup__file": "t.csv"}, "is looked up"),
        ("evaluation.min_steps=9", {"evaluation__epochs": None, "evaluation__steps": 3}, "steps"),
        ("data.conditions_apply_to=search", {}, "no labels are made wrong"),
        ("data.in_memory=true", {}, "only images of a folder"),
        ("data.in_memory=false", {"dataset": "random:cifar10"}, "only images of a folder"),
    ],
)
def test_what_changes_nothing_is_told_with_the_reason(assignment, context, why):
    (line,) = told(assignment, **context)
    key = assignment.partition("=")[0]
    assert line.startswith(f"{key} changes nothing here: ") and why in line


@pytest.mark.parametrize(
    ("assignment", "context"),
    [
        ("search.nodes=3", {"search__method": "random"}),
        ("search.space=darts", {"searches": False}),
        ("search.nodes=3", {"searches": False}),
        ("search.generator.quality=never", {"search__generator__name": "real"}),
        ("search.generator.lr=0.1", {}),
        ("search.generator.warmed_lr=0.1", {"search__generator__warmup_rounds": 2}),
        ("search.partial_channels=2", {"space": "pcdarts"}),
        ("search.progressive.max_skips=1", {"space": "pdarts"}),
        ("search.hypergradient=cg", {"search__order": "second"}),
        ("search.budget.weight=2", {"search__budget__parameters": 3.0}),
        ("data.conditions_apply_to=search", {"data__imbalance": 0.5}),
        ("data.in_memory=true", {"dataset": "folder:pictures"}),
        ("search.augmentation.cutout=2", {}),
        ("evaluation.weights.lr=0.1", {}),
        ("seed=3", {}),
    ],
)
def test_what_has_an_effect_is_not_told(assignment, context):
    assert told(assignment, **context) == []


def test_settings_of_one_reason_are_told_together():
    lines = told(
        "search.partial_channels=2",
        "search.generator.warmup_lr=1",
        "search.generator.warmup_batch_size=2",
    )
    assert [line.partition(" change")[0] for line in lines] == [
        "search.partial_channels", "search.generator.warmup_lr, search.generator.warmup_batch_size"
    ]  # fmt: skip


def test_of_a_file_only_what_differs_from_the_preset_is_told(tmp_path):
    recipe = load_recipe("smoke")
    file = tmp_path / "c.yaml"
    file.write_text(recipe.to_yaml())
    assert idle_settings(recipe, config=file) == []
    file.write_text(recipe.to_yaml().replace("in_memory: null", "in_memory: true"))
    (line,) = idle_settings(load_recipe("smoke", config=file), config=file)
    assert line.startswith("data.in_memory changes nothing")


def test_an_order_of_a_search_that_is_none_is_told():
    recipe = load_recipe("smoke", overrides={"search.method": "random"})
    (line,) = idle_settings(recipe, order="first")
    assert line.startswith("search.order changes nothing")


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.why)
def test_every_rule_is_of_settings_that_there_are(rule):
    for key in (*rule.keys, *rule.but):
        assert any(f"{known}.".startswith(f"{key}.") for known in KEYS), key
