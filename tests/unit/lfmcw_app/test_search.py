"""The search of a run. Whole runs are tried in tests/integration."""

from __future__ import annotations

import torch
from rich.console import Console

from lfmcw_app.data import load_dataset
from lfmcw_app.recipe_loading import load_recipe
from lfmcw_app.run_folder import RunFolder
from lfmcw_app.search import search
from lfmcw_app.search_space.genotype import Genotype


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
