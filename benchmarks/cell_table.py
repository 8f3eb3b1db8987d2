"""Trains every cell of a small NAS-Bench-201 space, and writes a table of their test errors.

    python benchmarks/cell_table.py folder:PATH --out cells.csv --set search.nodes=3

A search on the space is then measured without training: its cell's error is looked up
(docs/nasbench201.md). Each row is what `python -m lfmcw_app.evaluate CELL DATASET --space
nasbench201 --seed SEED` with the same options would report. The data are read once. Rows that the
file holds are not measured again, so the command can be stopped and repeated; with `--part 0/2` and
`--part 1/2` two processes share the work.
"""

from __future__ import annotations

import argparse
import csv
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch
from filelock import FileLock
from rich.console import Console

from lfmcw_app.complete_runs import evaluate_genotype
from lfmcw_app.data_checks import fitted, read_data
from lfmcw_app.resolving import resolve_recipe
from lfmcw_app.run_folder import RunFolder
from lfmcw_app.search_space.nasbench201 import all_cells

COLUMNS = (
    "cell", "seed", "test_error_percent", "training_error_percent", "parameters",
    "multiply_adds_millions", "seconds",
)  # fmt: skip


def done(path: Path) -> set[tuple[str, int]]:
    """The (cell, seed) of all rows of a table."""
    if not path.exists():
        return set()
    with path.open(newline="", encoding="utf-8") as file:
        rows = csv.DictReader(line for line in file if not line.startswith("#"))
        return {(row["cell"], int(row["seed"])) for row in rows}


def add(path: Path, row: dict[str, object]) -> None:
    """Appends a row, after the header where there is none."""
    with FileLock(f"{path}.lock"):
        fresh = not path.exists()
        with path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS)
            if fresh:
                writer.writeheader()
            writer.writerow(row)


def main() -> None:
    """Measures what is missing, seed by seed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("dataset")
    parser.add_argument("--out", type=Path, required=True, help="the table, a CSV file")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--set", dest="assign", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument(
        "--part", default="0/1", metavar="I/N", help="every N-th cell, from the I-th"
    )
    parser.add_argument("--data", type=Path, default=Path("data"))
    arguments = parser.parse_args()
    part, parts = map(int, arguments.part.split("/"))
    torch.set_num_threads(1)

    def recipe_of(seed: int):
        return resolve_recipe(
            arguments.dataset, arguments.preset, None, arguments.assign, seed, space="nasbench201"
        )

    first = recipe_of(arguments.seeds[0])
    _, images = read_data(first, arguments.data)
    cells = list(all_cells(first.search.nodes))[part::parts]
    silent, device = Console(quiet=True), torch.device("cpu")
    for seed in arguments.seeds:
        recipe = fitted(recipe_of(seed), images)
        for cell in cells:
            if (cell.notation(), seed) in done(arguments.out):
                continue
            folder = Path(tempfile.mkdtemp(prefix="cell-"))
            begun = time.process_time()
            run = RunFolder.create(folder / "run", recipe)
            result = evaluate_genotype(run, cell, images, silent, device)
            row = {name: result[name] for name in COLUMNS if name in result}
            seconds = round(time.process_time() - begun, 2)
            add(arguments.out, {"cell": cell.notation(), **row, "seed": seed, "seconds": seconds})
            shutil.rmtree(folder)
            print(cell.notation(), seed, row["test_error_percent"], seconds, file=sys.stderr)


if __name__ == "__main__":
    main()
