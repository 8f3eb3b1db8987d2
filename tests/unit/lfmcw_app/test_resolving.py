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
    ("settings", "space", "words"),
    [
        ({"search.space": "darts"}, "pdarts", "contradict each *other"),
        ({"search": {"space": "darts"}}, "pdarts", "contradict each *other"),
        ({"dataset": "cifar10"}, None, "drop the setting dataset="),
        ({"search.chanels": 8}, None, "Did you mean 'search.channels'"),
        ({8: 3}, None, "A key of a recipe is text, such as search.channels; got 8"),
    ],
)
def test_settings_that_contradict_are_refused(settings, space, words):
    with pytest.raises(InputError, match=words):
        resolve_recipe("digits", None, None, settings, None, space=space)


@pytest.mark.parametrize(
    ("option", "key", "value", "other"),
    [
        ("seed", "seed", 4, 3),
        ("order", "search.order", "first", "second"),
        ("method", "search.method", "darts", "lfmcw"),
    ],
)
def test_options_and_settings_must_agree(option, key, value, other):
    def made(**more):
        given = {"seed": None, **more}
        return resolve_recipe("digits", "smoke", None, **given)

    alone = made(settings=None, **{option: value})
    assert made(settings={key: value}, **{option: value}) == alone
    section, _, name = key.rpartition(".")
    for settings in ({key: other}, {section: {name: other}} if section else {key: None}):
        with pytest.raises(InputError, match=f"--{option} is {value!r}, and --set {key} is"):
            made(settings=settings, **{option: value})


def test_options_go_over_a_file_that_has_every_setting(tmp_path):
    """As --print-config writes it: it serves for other seeds too."""
    path = tmp_path / "c.yaml"
    path.write_text(resolve_recipe("digits", None, None, None, None).to_yaml())
    recipe = resolve_recipe("digits", None, path, None, 4, order="first", method="darts")
    assert (recipe.seed, recipe.search.order, recipe.search.method) == (4, "first", "darts")


def test_a_space_by_set_has_the_presets_settings_for_it():
    by_option = resolve_recipe("digits", None, None, None, None, space="pdarts")
    by_set = resolve_recipe("digits", None, None, {"search.space": "pdarts"}, None)
    assert by_option == by_set


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dataset: cifar10", "DATASET is 'digits', and dataset in .* is 'cifar10'"),
        ("preset: paper", "--preset is 'small', and preset in .* is 'paper'"),
        ("search: {space: darts}", "--space is 'pdarts', and search.space in .* is 'darts'"),
    ],
)
def test_a_file_that_contradicts_an_option_is_refused(tmp_path, text, words):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=words):
        resolve_recipe("digits", "small", path, None, None, space="pdarts")


def test_preset_and_space_of_a_file_are_those_it_goes_over(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("preset: small\nsearch: {space: pdarts}\ndataset: digits")
    by_file = resolve_recipe("digits", None, path, None, None)
    assert by_file == resolve_recipe("digits", "small", None, None, None, space="pdarts")
    path.write_text("preset: custom")  # what Recipe() is called
    assert resolve_recipe("digits", None, path, None, None).search.steps == 15
    path.write_text("preset: [small]")
    with pytest.raises(InputError, match=r"Unknown preset \['small'\]"):
        resolve_recipe("digits", None, path, None, None)


def test_a_preset_may_be_a_setting_too():
    by_option = resolve_recipe("digits", "small", None, None, None)
    assert resolve_recipe("digits", None, None, {"preset": "small"}, None) == by_option
    with pytest.raises(InputError, match="--preset is 'paper', and --set preset is 'small'"):
        resolve_recipe("digits", "paper", None, {"preset": "small"}, None)


@pytest.mark.parametrize(
    ("files", "cuda", "preset"), [(3, False, "small"), (3, True, "small"), (60, True, "paper"),
                                  (60, False, "small")]
)  # fmt: skip
def test_a_folder_has_the_preset_of_its_size_and_device(tmp_path, monkeypatch, files, cuda, preset):
    monkeypatch.setattr("lfmcw_app.resolving.LARGE_FOLDER", 50)
    for index in range(files):
        (tmp_path / str(index % 2)).mkdir(exist_ok=True)
        (tmp_path / str(index % 2) / f"{index}.png").touch()
    dataset = f"folder:{tmp_path}"
    assert default_preset(dataset, cuda=cuda) == preset
    assert resolve_recipe(dataset, None, None, None, None, cuda=cuda).preset == preset
    assert resolve_recipe(dataset, "smoke", None, None, None, cuda=cuda).preset == "smoke"
