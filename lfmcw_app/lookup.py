"""Looks up a run's test error in a table of all cells of its space, instead of training a network.

The recipe's section `lookup` names the table and holds a digest of it, so a run is still a function
of its recipe. The file may move, but not change.
"""

from __future__ import annotations

import hashlib
import statistics
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from lfmcw_app.cell_table import CellTable
from lfmcw_app.cell_table_file import read_cell_table
from lfmcw_app.errors import DataWarning, InputError
from lfmcw_app.nats_bench import is_nats_bench, read_nats_bench
from lfmcw_app.near_paths import near_paths
from lfmcw_app.provenance import made_by
from lfmcw_app.recipe import Recipe
from lfmcw_app.result import as_json, of_run
from lfmcw_app.run_folder import RunFolder
from lfmcw_app.search_space.genotype import Cells
from lfmcw_app.search_space.nasbench201 import SumCell, sum_edges
from lfmcw_app.spaces import space_named

__all__ = ["look_up", "open_table", "table_of", "with_table_digest"]


# ------------------------------ the file


def open_table(path: Path, dataset: str) -> CellTable:
    """Reads a table of one of the formats.

    Args:
        path: a CSV file of this program, or the file or folder of NATS-Bench.
        dataset: whose test errors are wanted.

    Raises:
        InputError: if it is no such table, is damaged, or lacks the data set.
    """
    if is_nats_bench(path):
        return read_nats_bench(path, dataset)
    if path.suffix == ".pth" or path.is_dir():
        raise InputError(
            f"{path} is not a table that can be read. Of the published tables, take NATS-Bench's "
            "file or folder for the topology space, which has the cells of NAS-Bench-201 "
            "(docs/nasbench201.md)."
        )
    return read_cell_table(path, dataset)


def with_table_digest(recipe: Recipe) -> Recipe:
    """The recipe with the digest of its table, if it looks its error up.

    Raises:
        InputError: if there is no such file, or the recipe has another digest of it.
    """
    how = recipe.lookup
    if how.file is None:
        return recipe
    digest = _digest(Path(how.file))
    if how.digest not in (None, digest):
        raise InputError(
            f"{how.file} is not the table of the recipe: lookup.digest is {how.digest}, but the "
            f"file's digest is {digest}. Name the recipe's table with --lookup FILE, or start a "
            "new run."
        )
    return recipe.model_copy(update={"lookup": how.model_copy(update={"digest": digest})})


def _digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and digests of a folder's files."""
    try:
        if not path.is_dir():
            return _digest_of_file(path, *_stamp(path))
        files = sorted(file for file in path.iterdir() if file.is_file())
        lines = [f"{_digest_of_file(file, *_stamp(file))}  {file.name}\n" for file in files]
    except OSError as error:
        raise InputError(
            f"--lookup: the table {path} cannot be read ({error.strerror or error})."
            f"{near_paths(path)} If it has moved, name the new place with --lookup FILE."
        ) from None
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _stamp(path: Path) -> tuple[int, int]:
    """What changes with the content of a file."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=2**15)
def _digest_of_file(path: Path, size: int, changed: int) -> str:
    """The digest is cached by size and time of change, because large files take seconds."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ------------------------------ a run's


def table_of(recipe: Recipe) -> CellTable | None:
    """The table of a recipe, checked against its search; None if the recipe trains instead.

    Raises:
        InputError: if it cannot be read, has been changed, is not complete, has fractions for
            percentages, or is of another space, number of nodes or data set.
    """
    how = with_table_digest(recipe).lookup
    if how.file is None or how.digest is None:
        return None
    table = _opened(Path(how.file), how.digest, how.dataset or recipe.dataset)
    search = recipe.search
    if (search.space, search.nodes) != (table.space, table.nodes):
        raise InputError(
            f"The table {how.file} holds the cells of the space {table.space} with {table.nodes} "
            f"nodes, but the recipe is for {search.space} with {search.nodes}. Use --space "
            f"{table.space} --set search.nodes={table.nodes}, or another table."
        )
    if not table.complete:
        raise InputError(
            f"The table {how.file} is not complete: it has {table.trainings:,} of "
            f"{table.expected * table.seeds:,} trainings, {table.seeds} for each of "
            f"{table.expected:,} cells. Regret and rank need all of them. Let its writer finish."
        )
    _check_cells(table, how.file)
    _check_errors(table, how.file)
    return table


def _check_cells(table: CellTable, file: str) -> None:
    """Refuses a table whose cells are not those of its space, whatever its file says."""
    cells = space_named(table.space).all_cells(table.nodes)
    if cells is None:
        raise InputError(
            f"The table {file} cannot be complete: the space {table.space} has too many cells. "
            "Use --space nasbench201, or train without --lookup."
        )
    count = 0
    for cell in cells:
        count += 1
        if cell.notation() not in table.cells:
            raise InputError(
                f"The table {file} is not complete: it says that the space has {table.expected:,} "
                f"cells, but lacks {cell.notation()}. Regret and rank need all cells of "
                f"{table.space} with {table.nodes} nodes."
            )
    if count != len(table.cells):
        raise InputError(
            f"The table {file} has {len(table.cells):,} cells, but the space {table.space} with "
            f"{table.nodes} nodes has {count:,}. Remove the rows of other cells."
        )


def _check_errors(table: CellTable, file: str) -> None:
    """Refuses fractions in the place of percentages, and doubts accuracies in that of errors.

    The cell without an operation passes nothing on, so its network guesses, and a table that holds
    errors has most other cells below it.

    Raises:
        InputError: if no error is above 1%.
    """
    means = {notation: cell.mean for notation, cell in table.cells.items()}
    highest = max(means.values())
    if highest <= 1.0:
        raise InputError(
            f"The table {file} has no error above {highest:g}%, though some of its cells learn "
            "nothing: these are fractions. Multiply its errors by 100: test_error_percent is a "
            "percentage."
        )
    median = statistics.median(means.values())
    guessed = means.get(SumCell(("none",) * len(sum_edges(table.nodes))).notation(), median)
    if guessed < median:
        warnings.warn(
            f"In the table {file}, the cell without an operation, which can only guess, has an "
            f"error of {guessed:g}%, and half of the cells have at least {median:g}%. If these are "
            "accuracies, replace them by 100 minus the accuracy: regret and rank are wrong.",
            DataWarning,
            stacklevel=2,
        )


@lru_cache(maxsize=1)
def _opened(path: Path, digest: str, dataset: str) -> CellTable:
    """The table with this digest, cached because large ones take minutes."""
    return open_table(path, dataset)


def look_up(
    folder: RunFolder, genotype: Cells, table: CellTable, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Writes the error of a genotype in a table as the run's result, and returns it.

    Args:
        folder: of the run.
        genotype: the cells.
        table: of all cells.
        device: the search's device, for the record of what made the result.

    Raises:
        InputError: if the table does not hold the genotype.
    """
    # Slow to import, and not needed to resolve a recipe.
    from lfmcw_app.search_end import generator_result

    recipe = folder.recipe
    folder.record_changes("lookup", 0)
    trained = table.trained(genotype)
    result = {
        "dataset": recipe.dataset,
        "test_error_percent": round(trained.mean, 4),
        "lookup": {
            "file": table.name,
            "digest": recipe.lookup.digest,
            "dataset": table.dataset,
            "seeds": list(trained.errors),
            "regret_percent": round(table.regret(genotype), 4),
            "rank": table.rank(genotype),
            "cells": len(table.cells),
            "best_cell": table.best,
        },
        "parameters": trained.parameters,
        "multiply_adds_millions": round(trained.multiply_adds, 3),
        **generator_result(folder),
        **of_run(folder, genotype),
    }
    folder.complete(as_json(result), made_by(torch.device(device)))
    return result
