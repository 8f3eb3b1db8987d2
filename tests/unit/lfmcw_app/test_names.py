"""Names that command lines take."""

from __future__ import annotations

from importlib import resources

from lfmcw_app.data import short_name
from lfmcw_app.names import FOLDER, PRESETS, RANDOM


def test_every_preset_has_a_file():
    files = resources.files("lfmcw_app").joinpath("recipes").iterdir()
    assert {file.name.split(".")[0] for file in files} == set(PRESETS)


def test_what_a_name_begins_with_is_not_part_of_its_short_name():
    assert short_name(f"{FOLDER}/some/pictures") == "pictures"
    assert short_name(f"{RANDOM}cifar10") == short_name("cifar10")
