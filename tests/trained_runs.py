"""Folders of evaluations that took a second: pictures, a few rounds of training, network.pt."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from small_pictures import write_classes

from lfmcw_app import training
from lfmcw_app.complete_runs import evaluate_genotype
from lfmcw_app.data import Dataset, load_dataset
from lfmcw_app.network_file import write_network
from lfmcw_app.recipe_loading import load_recipe, parsed_settings
from lfmcw_app.run_files import EVALUATED
from lfmcw_app.run_folder import RunFolder
from lfmcw_app.search_space.genotype import random_genotype

CLASSES = {"T-shirt $5": 9, "cat": 9, "dog": 9}
SETTINGS = (
    "evaluation.channels=2",
    "evaluation.layers=3",
    "evaluation.epochs=null",
    "evaluation.steps=4",
    "evaluation.batch_size=8",
    "evaluation.auxiliary_weight=0.4",
    "data.image_size=8",
)


@dataclass
class Trained:
    """A finished evaluation.

    Attributes:
        path: the run folder.
        pictures: the folder of images, with train and test.
        dataset: as it was read.
        networks: copies of the network as it was when network.pt was written.
    """

    path: Path
    pictures: Path
    dataset: Dataset
    networks: list[torch.nn.Module] = field(default_factory=list)


def trained_run(folder, monkeypatch, *, settings=()):
    """Trains a network on pictures of 12×10 pixels, in `folder`/run."""
    pictures = folder / "pictures"
    write_classes(pictures / "train", CLASSES, size=(12, 10))
    write_classes(pictures / "test", dict.fromkeys(CLASSES, 4), size=(10, 12))
    recipe = load_recipe(
        "smoke",
        overrides={"dataset": f"folder:{pictures}", **parsed_settings((*SETTINGS, *settings))},
    )
    dataset = load_dataset(recipe.dataset, image_size=8)
    run = RunFolder.create(folder / "run", recipe)
    genotype = random_genotype(2, 0)
    run.write(EVALUATED, genotype.to_json())
    trained = Trained(run.path, pictures, dataset)

    def recorded(folder, network, *arguments):
        trained.networks.append(network)
        write_network(folder, network, *arguments)

    monkeypatch.setattr(training, "write_network", recorded)
    evaluate_genotype(run, genotype, dataset, Console(quiet=True), torch.device("cpu"))
    return trained


def copied(trained, folder):
    """A copy of a finished evaluation's folder, to be changed."""
    return Path(shutil.copytree(trained.path, folder / "copy"))
