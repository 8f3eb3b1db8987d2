"""The data set that is kept for the runs that follow."""

from __future__ import annotations

from pathlib import Path

from lfmcw_app.data import load_dataset
from lfmcw_app.data_checks import read_data
from lfmcw_app.kept_data import keeping_data, reader
from lfmcw_app.recipe_loading import load_recipe


def read(**overrides):
    return read_data(load_recipe("smoke", overrides=overrides), Path("data"))[1]


def test_a_data_set_is_read_once_for_runs_of_one_kind():
    with keeping_data():
        first = read(seed=0)
        assert read(seed=1) is first
        other = read(**{"data.image_size": 8, "dataset": "random:cifar10"})
        assert other is not first
        assert read(**{"data.image_size": 8, "dataset": "random:cifar10"}) is other
        assert read(seed=0) is not first  # one is kept at a time


def test_nothing_is_kept_otherwise():
    assert read() is not read()
    with keeping_data():
        assert reader() is not load_dataset
    assert reader() is load_dataset
