"""Names that command lines take."""

from __future__ import annotations

from importlib import resources

from lfmcw_app.data import short_name
from lfmcw_app.names import FOLDER, PRESETS, RANDOM


def test_every_preset_has_a_file():
    files = resources.files("lfmcw_app").joinpath("recipes").iterdir()
    assert {file.name.split(".")[0] for file in files} == set(PRESETS)


def test_a_short_name_has_no_colon_and_no_path():
    assert short_name(f"{FOLDER}/some/pictures") == "pictures"
    assert short_name(f"{RANDOM}cifar10") == "random-cifar10"
