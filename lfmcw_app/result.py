"""The result of a run, as a file and printed."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from lfmcw_app.printing import print_table, say
from lfmcw_app.result_file import (
    check_complete,
    clearly_harder,
    how_sure,
    worst_classes,
    wrong_images,
)
from lfmcw_app.resuming import numbers_changed
from lfmcw_app.run_files import CELLS, METRICS, NETWORK, REPORT, RESULT, SAMPLES
from lfmcw_app.run_folder import RunFolder
from lfmcw_app.search_space.genotype import Cells
from lfmcw_app.spaces import space_named

__all__ = ["as_json", "edge_names", "of_run", "print_result"]

OF_RESULTS = ("genotype", "test_error_percent", "parameters", "multiply_adds_millions", "seed")
"""Entries of every result."""


def as_json(result: dict[str, Any]) -> str:
    """The text of result.json: one line per entry, and one per class in lists of classes."""
    lines = []
    for key, value in result.items():
        if isinstance(value, list) and value and isinstance(value[0], (list, dict)):
            rows = ",\n".join(f"  {json.dumps(row, ensure_ascii=False)}" for row in value)
            lines.append(f" {json.dumps(key)}: [\n{rows}\n ]")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


def of_run(folder: RunFolder, genotype: Cells) -> dict[str, Any]:
    """The last entries of every result: the seed, what makes the run exceptional, and the cells."""
    recipe = folder.recipe
    return {
        "seed": recipe.seed,
        **({"trial": True} if recipe.trial else {}),
        **({"changed": changed} if (changed := numbers_changed(folder.path)) else {}),
        "genotype": genotype.to_data(),
    }


def print_result(result: dict[str, Any], folder: RunFolder, console: Console) -> None:
    """Prints the derived cells, the test error, and where everything is.

    Raises:
        InputError: if the result lacks an entry that is printed.
    """
    entries = [*OF_RESULTS, *(() if "lookup" in result else ("test_images", "dataset"))]
    check_complete(result, folder.path / RESULT, entries)
    table = Table(title="derived cells", title_justify="left")
    for column in ("cell", "node", "edges"):
        table.add_column(column)
    cells = space_named(folder.recipe.search.space).genotype
    for kind, nodes in result["genotype"].items():
        for node, edges in enumerate(nodes):
            named = ", ".join(edge_names(edges, cells))
            table.add_row(kind if node == 0 else "", str(node), named)
    print_table(console, table)
    sure = how_sure(result)
    error = f"{result['test_error_percent']:.2f}%" + (f" ({sure})" if sure else "")
    say(
        console,
        f"test error {error} {_source(result)}, "
        f"{result['parameters']:,} parameters, "
        f"{result['multiply_adds_millions']:,.1f} M multiply-adds, seed {result['seed']}",
    )
    if "lookup" in result:
        found = result["lookup"]
        say(
            console,
            f"regret {found['regret_percent']:.2f} percentage points against the best cell, rank "
            f"{found['rank']:,} of {found['cells']:,}; the best is {found['best_cell']}",
        )
    for unit, found in result.get("budget", {}).items():
        say(
            console,
            f"budget {'met' if found['met'] else 'not met'}: {found['actual']:.4g} of at most "
            f"{found['limit']:g} million {unit.replace('_', '-')}",
        )
    _print_classes(result.get("classes", []), console)
    for doubt in (result.get("generator") or {}).get("doubts", []):
        console.print("[bold yellow]Generator:[/]", end=" ")
        say(console, doubt)
    if "doubt" in result:
        console.print("[bold yellow]Doubtful:[/]", end=" ")
        say(console, result["doubt"])
    optional = (REPORT, CELLS[0], SAMPLES, NETWORK, METRICS)
    present = [name for name in optional if (folder.path / name).exists()]
    found = ", ".join([*present, RESULT])
    say(console, f"In {folder.path}: {found}")
    if NETWORK in present:
        run = shlex.quote(str(folder.path))
        say(console, f"Predict images with it: python -m lfmcw_app.predict {run} IMAGE...")


def _source(result: dict[str, Any]) -> str:
    """Where the test error comes from, in words."""
    if "lookup" not in result:
        return f"on images of {result['dataset']}"
    found = result["lookup"]
    trainings = len(found["seeds"])
    of = "one training" if trainings == 1 else f"mean of {trainings} trainings"
    return f"on {found['dataset']}, looked up in {found['file']} ({of})"


def _print_classes(classes: list[dict[str, Any]], console: Console) -> None:
    """Names the classes with the largest errors."""
    worst = worst_classes(classes)
    if len(classes) <= 2 or not worst:
        return
    named = ", ".join(
        f"{entry['name']} ({wrong_images(entry):,} of {entry['images']:,} wrong)" for entry in worst
    )
    chance = "" if clearly_harder(classes) else "; chance alone can explain these"
    say(console, f"largest errors by class: {named}{chance}")


def edge_names(edges: Iterable[Any], cells: Cells | type[Cells]) -> list[str]:
    """The edges of a node, [primitive, source] each, in words."""
    return [f"{primitive} from {cells.state_name(source)}" for primitive, source in edges]
