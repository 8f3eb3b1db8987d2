"""What a wrong key or value of a recipe gets as an answer."""

from __future__ import annotations

import pytest

from lfmcw_app.errors import InputError
from lfmcw_app.recipe_loading import load_recipe, parsed_settings, validate_recipe


def refused(*assignments):
    with pytest.raises(InputError) as caught:
        load_recipe("smoke", overrides={"dataset": "digits", **parsed_settings(assignments)})
    return str(caught.value)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("search.lamda", "'search.lambda'"),
        ("search.generator.lamda", "'search.lambda'"),
        ("evaluation.lambda", "'search.lambda'"),
        ("serch.lambda", "'search.lambda'"),
        ("search.Batch-size", "'search.batch_size'"),
        ("search.lr", "'search.weights.lr'"),
        ("search.progressive.added_layer", "'search.progressive.added_layers'"),
        ("epochs", "'search.epochs' or 'evaluation.epochs'"),
    ],
)
def test_a_wrong_key_gets_the_whole_key_that_was_meant(given, meant):
    assert f"Did you mean {meant}?" in refused(f"{given}=1")


def test_few_keys_are_listed_after_a_suggestion():
    assert refused("search.lamda=1").count(",") == 8
    assert refused("search.k=1").count(",") > 20


def test_a_key_of_a_list_is_named_with_its_place():
    said = refused("data.wrong_labels=[{of: cat, as: [dog], shares: 0.5}]")
    assert "'data.wrong_labels[0].shares'. Did you mean 'data.wrong_labels.share'?" in said
    assert "The keys of data.wrong_labels[0] are as, in, of, share." in said


@pytest.mark.parametrize("given", ["search.k", "search.budget.foo", "colour", "lambda" * 40])
def test_no_unrelated_key_is_suggested(given):
    said = refused(f"{given}=1")
    assert "Did you mean" not in said
    assert f"{given!r}" in said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("search.channels=abc", "must be a whole number, got 'abc'."),
        ("search.channels=", "must be a whole number, got no value (null)."),
        ("search.channels=-3", "must be at least 4, got -3."),
        ("search.weights.lr=.inf", "must be a finite number, got inf."),
        ("search.weights.lr=-1", "must be more than 0"),
        ("search.method=lfm", "must be 'lfmcw', 'darts' or 'random', got 'lfm'. Did you mean"),
        ("search.order=1", "must be 'first' or 'second', got 1."),
        ("lookup.file=5", "must be text, got 5."),
        ("data.wrong_labels=cat", "must be a list, as [a, b], got 'cat'."),
        ("data.wrong_labels=[{of: cat}]", "lacks 'as', got {'of': 'cat'}."),
        ("data.wrong_labels=[{of: a, as: [b], share: 5}]", "[0].share' must be at most 1, got 5."),
        ("data.search_fractions=[0.5]", "takes 2 values, got [0.5]."),
        ("data.search_fractions=[0.1, 0.1, 0.1]", "takes 2 values, got [0.1, 0.1, 0.1]."),
        ("data.image_size=30", "divisible by 4: two cells halve the resolution; got 30."),
        ("search.weights=3", "is a section of keys, got 3. Set one of them, as --set search.wei"),
    ],
)
def test_a_wrong_value_gets_what_the_key_takes(given, said):
    assert said in refused(given)


@pytest.mark.parametrize("tree", [None, [], "search"])
def test_what_is_no_mapping_is_called_no_recipe(tree):
    """Such as the config.yaml of a run that a full disk has emptied."""
    with pytest.raises(InputError, match="A recipe is a mapping of keys to values, got"):
        validate_recipe(tree)
