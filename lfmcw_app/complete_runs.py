"""Whole runs: a search and the training of what it found, or the training of a given genotype."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console

from lfmcw_app.data import Dataset
from lfmcw_app.network_file import NETWORK
from lfmcw_app.pictures import describe_dataset
from lfmcw_app.run_folder import RunFolder
from lfmcw_app.search import search
from lfmcw_app.search_space.genotype import Genotype
from lfmcw_app.stages import TRAINING
from lfmcw_app.training import train_derived

__all__ = ["evaluate_genotype", "run"]


def run(
    folder: RunFolder, dataset: Dataset, console: Console, device: torch.device
) -> dict[str, Any]:
    """Runs both phases, from where the folder's checkpoints stand, and returns the result."""

    def both() -> dict[str, Any]:
        genotype = search(folder, dataset, console, device)
        return train_derived(folder, genotype, dataset, console, device)

    return _completed(folder, dataset, both)


def evaluate_genotype(
    folder: RunFolder, genotype: Genotype, dataset: Dataset, console: Console, device: torch.device
) -> dict[str, Any]:
    """Trains a given genotype's network, from the folder's checkpoint on; returns the result."""
    return _completed(
        folder, dataset, lambda: train_derived(folder, genotype, dataset, console, device)
    )


def _completed(
    folder: RunFolder, dataset: Dataset, work: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The result of a folder, from `work` where it has none yet.

    A folder of an earlier version may have a result and no network.pt. `work` then tests the
    network of its last checkpoint once more, and writes both.
    """
    result = folder.result
    checkpoints = folder.checkpoints(TRAINING)
    can_be_written = checkpoints.exists() and not (folder.path / NETWORK).exists()
    if result is not None and not can_be_written:
        return result
    with folder.locked():
        if folder.writes:
            describe_dataset(dataset, folder)
        return work()
