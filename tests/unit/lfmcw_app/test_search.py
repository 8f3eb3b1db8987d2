"""A run: what it needs of its data, and its search. Whole runs are tried in tests/integration."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console

from lfmcw_app.data import load_dataset
from lfmcw_app.errors import InputError
from lfmcw_app.recipe import load_recipe
from lfmcw_app.run_folder import RunFolder
from lfmcw_app.search import read_data, run, search
from lfmcw_app.search_space.genotype import Genotype


@pytest.mark.parametrize(
    ("fractions", "images", "batch"), [([0.6, 0.4], 99, 40), ([0.29, 0.71], 100, 29)]
)
def test_a_batch_may_take_all_images_of_a_part(fractions, images, batch):
    """A batch as large as the smaller part of the search images is accepted.

    59 and 40 of 99 images: the second part gets the rest; 0.29 · 100 is 28.999999999999996.
    """
    settings = {
        "dataset": "digits",
        "data.search_images": images,
        "data.search_fractions": fractions,
    }
    read_data(load_recipe("smoke", overrides=settings | {"search.batch_size": batch}), Path("data"))
    with pytest.raises(InputError, match=f"leaves only {batch} images"):
        read_data(
            load_recipe("smoke", overrides=settings | {"search.batch_size": batch + 1}),
            Path("data"),
        )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"evaluation.batch_size": 4000}, "evaluation.batch_size is 4000"),
        ({"search.architecture.warmup_epochs": 1000}, "search.architecture.warmup_epochs"),
        ({"search.weights.warmup_epochs": 1000}, "search.weights.warmup_epochs"),
        ({"evaluation.weights.warmup_epochs": 1000}, "evaluation.weights.warmup_epochs"),
        ({"evaluation.stem": "imagenet"}, "evaluation.stem is imagenet.*multiple of 32"),
        ({"evaluation.augmentation.cutout": 8}, "cutout is 8, which would erase images"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_does_not_fit_the_data_is_refused(changes, words):
    with pytest.raises(InputError, match=words):
        read_data(load_recipe("smoke", overrides=changes), Path("data"))


def test_a_training_alone_needs_no_batch_of_a_search():
    recipe = load_recipe("smoke", overrides={"search.batch_size": 4000})
    with pytest.raises(InputError, match=r"search\.batch_size is 4000"):
        read_data(recipe, Path("data"))
    assert read_data(recipe, Path("data"), searches=False).name == "digits"


def test_looking_at_the_data_draws_no_random_numbers():
    """It builds the modules of a search, to refuse those that do not fit."""
    before = torch.get_rng_state()
    read_data(load_recipe("smoke"), Path("data"))
    assert torch.equal(torch.get_rng_state(), before)


def test_random_cells_are_a_function_of_the_seed(tmp_path):
    digits = load_dataset("digits")
    found = []
    for number, seed in enumerate((3, 3, 4)):
        recipe = load_recipe("smoke", overrides={"search.method": "random", "seed": seed})
        folder = RunFolder.create(tmp_path / str(number), recipe)
        found.append(search(folder, digits, Console(quiet=True), torch.device("cpu")))
        assert Genotype.load(folder.path / "genotype.json") == found[-1]
        assert (folder.path / "cells.svg").exists()
    assert found[0] == found[1] != found[2]


def test_a_complete_run_is_not_run_again(tmp_path):
    folder = RunFolder.create(tmp_path / "run", load_recipe("smoke"))
    folder.write("result.json", '{"test_error_percent": 1.5}')
    found = run(folder, load_dataset("digits"), Console(quiet=True), torch.device("cpu"))
    assert found == {"test_error_percent": 1.5}
    assert not folder.metrics.exists()
