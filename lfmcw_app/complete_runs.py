"""Whole runs: a search and the training of what it found, or the training of a given genotype.

If the recipe names a table of all cells, the error is looked up there and nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console

from lfmcw_app.data import Dataset, short_name
from lfmcw_app.fingerprint import check_unchanged
from lfmcw_app.lookup import look_up, table_of
from lfmcw_app.memory import enough_memory
from lfmcw_app.numerics import numerics_of
from lfmcw_app.pictures import describe_dataset, save_cells
from lfmcw_app.run_files import NETWORK
from lfmcw_app.run_folder import RunFolder
from lfmcw_app.search import search
from lfmcw_app.search_space.genotype import Cells
from lfmcw_app.stages import TRAINING
from lfmcw_app.training import train_derived

__all__ = ["evaluate_genotype", "is_complete", "look_up_genotype", "run"]


def run(
    folder: RunFolder, dataset: Dataset, console: Console, device: torch.device
) -> dict[str, Any]:
    """Runs both phases, from where the folder's checkpoints stand, and returns the result.

    Raises:
        InputError: if the table that the recipe names cannot be used; before anything is run.
    """
    table = table_of(folder.recipe)

    def both() -> dict[str, Any]:
        with (
            numerics_of(folder.recipe, "search"),
            enough_memory("search", folder.recipe, device, resumes=folder.path),
        ):
            genotype = search(folder, dataset, console, device)
        if table is not None:
            return look_up(folder, genotype, table, device)
        return _trained(folder, genotype, dataset, console, device)

    return _completed(folder, dataset, both)


def evaluate_genotype(
    folder: RunFolder, genotype: Cells, dataset: Dataset, console: Console, device: torch.device
) -> dict[str, Any]:
    """Trains a given genotype's network, from the folder's checkpoint on; returns the result."""

    def training() -> dict[str, Any]:
        if folder.draws:
            save_cells(genotype, folder, f"given genotype, {short_name(dataset.name)}")
        return _trained(folder, genotype, dataset, console, device)

    return _completed(folder, dataset, training)


def look_up_genotype(folder: RunFolder, genotype: Cells) -> dict[str, Any]:
    """Looks up the error of a given genotype, for which no data are needed; returns the result.

    Raises:
        InputError: if the table cannot be used, or does not hold the genotype.
    """
    if folder.result is not None:
        return folder.result
    table = table_of(folder.recipe)
    assert table is not None
    with folder.locked():
        if folder.draws:
            save_cells(genotype, folder, f"given genotype, {short_name(folder.recipe.dataset)}")
        return look_up(folder, genotype, table)


def _trained(
    folder: RunFolder, genotype: Cells, dataset: Dataset, console: Console, device: torch.device
) -> dict[str, Any]:
    with (
        numerics_of(folder.recipe, "evaluation"),
        enough_memory("training", folder.recipe, device, resumes=folder.path),
    ):
        return train_derived(folder, genotype, dataset, console, device)


def is_complete(folder: RunFolder) -> bool:
    """Whether a folder has its result, and nothing is left to do."""
    return folder.result is not None and not folder.changes and not _lacks_network(folder)


def _lacks_network(folder: RunFolder) -> bool:
    return not (folder.path / NETWORK).exists() and folder.checkpoints(TRAINING).exists()


def _completed(
    folder: RunFolder, dataset: Dataset, work: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The result of a folder, made by `work` if it has none yet.

    A folder of an earlier version may have a result but no network.pt. `work` then tests the
    network of the last checkpoint once more, and writes both.
    """
    # A complete run is checked too: its result would be reported for these data.
    check_unchanged(folder.path, dataset.fingerprint)
    if folder.result is not None and not folder.changes:
        folder.finish_clearing()  # before its checkpoints could pass for those of a run
    lacks_network = _lacks_network(folder)

    def held() -> dict[str, Any] | None:
        return None if folder.changes or lacks_network else folder.result

    if (result := held()) is not None:
        return result
    with folder.locked():
        # Another process may have completed and cleared it before the lock was free.
        if (result := held()) is not None:
            return result
        if folder.writes:
            describe_dataset(dataset, folder)
        result = work()
        folder.clear()
        return result
