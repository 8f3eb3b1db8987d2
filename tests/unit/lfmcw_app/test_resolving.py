"""The recipe that a command line asks for."""

from __future__ import annotations

import pytest

from lfmcw_app.errors import InputError
from lfmcw_app.resolving import default_preset, resolve_recipe


@pytest.mark.parametrize(
    ("dataset", "preset"),
    [("digits", "smoke"), ("fashion-mnist", "small"), ("cifar10", "paper"), ("imagenet", "paper")],
)
def test_a_data_set_has_its_preset(dataset, preset):
    assert default_preset(dataset) == preset
    assert resolve_recipe(dataset, None, None, None, None).preset == preset


def test_imagenet_is_searched_with_partial_channels():
    assert resolve_recipe("imagenet", None, None, None, None).search.space == "pcdarts"
    assert resolve_recipe("cifar10", None, None, None, None).search.space == "darts"


@pytest.mark.parametrize(
    ("assign", "space", "words"),
    [
        (["search.space=darts"], "pdarts", "contradict each other"),
        (["dataset=cifar10"], None, "drop --set dataset="),
        (["search.chanels=8"], None, "Did you mean 'channels'"),
    ],
)
def test_settings_that_contradict_are_refused(assign, space, words):
    with pytest.raises(InputError, match=words):
        resolve_recipe("digits", None, None, assign, None, space=space)


def test_a_space_by_set_has_the_presets_settings_for_it():
    by_option = resolve_recipe("digits", None, None, None, None, space="pdarts")
    by_set = resolve_recipe("digits", None, None, ["search.space=pdarts"], None)
    assert by_option == by_set
