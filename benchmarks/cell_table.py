"""Trains every cell of a small NAS-Bench-201 space, and writes a table of their test errors.

    python benchmarks/cell_table.py folder:PATH --named cifar10 --out cells.csv --set search.nodes=3

A search on the space is then measured without training: its cell's error is looked up
(docs/nasbench201.md). Each row is what `python -m lfmcw_app.evaluate CELL DATASET --space
nasbench201 --seed SEED` with the same options would report. The data are read once. Rows in the
file are not measured again, so you can stop and repeat the command. It does not continue a table of
another recipe, other data or other seeds. With `--part 0/2` and `--part 1/2` two processes share
the work.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import shlex
import shutil
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from rich.console import Console

from lfmcw_app.cell_table_file import CellTableFile, Row
from lfmcw_app.complete_runs import evaluate_genotype
from lfmcw_app.data import Dataset
from lfmcw_app.data_checks import fitted, read_data
from lfmcw_app.provenance import commit
from lfmcw_app.recipe import Recipe
from lfmcw_app.recipe_loading import parsed_settings
from lfmcw_app.resolving import resolve_recipe
from lfmcw_app.run_folder import RunFolder
from lfmcw_app.search_space.nasbench201 import all_cells

MORE = ("training_error_percent", "seconds")
"""Columns besides those that a look-up reads; seconds are of the processor."""


def head(arguments: argparse.Namespace) -> dict[str, str]:
    """The command that the file records; it leaves out which part a process measured."""
    settings = [f"--set {shlex.quote(setting)}" for setting in arguments.assign]
    seeds = " ".join(map(str, arguments.seeds))
    return {
        "command": f"python benchmarks/cell_table.py folder:PATH --named {arguments.named} --out "
        f"FILE --preset {arguments.preset} {' '.join(settings)} --seeds {seeds}",
        "commit": commit() or "unknown",
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {platform.system()}",
        "date": date.today().isoformat(),
    }


def made_of(recipe: Recipe, images: Dataset, seeds: list[int]) -> dict[str, str]:
    """What every row depends on: digests of the training's recipe and of the data, and the seeds.

    Where the images are is no matter of the table, and neither is what only a search reads.
    """
    read = {"data", "evaluation"}
    text = json.dumps(recipe.model_dump(mode="json", by_alias=True, include=read), sort_keys=True)
    return {
        "recipe": hashlib.sha256(text.encode()).hexdigest()[:16],
        "data": images.fingerprint.digest,
        "seed list": " ".join(map(str, seeds)),
    }


def main() -> None:
    """Measures the missing rows, seed by seed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("dataset")
    parser.add_argument("--named", help="name of the data set in the table; by default DATASET")
    parser.add_argument("--out", type=Path, required=True, help="the table, a CSV file")
    parser.add_argument("--preset", default="small")
    parser.add_argument("--set", dest="assign", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument(
        "--part", default="0/1", metavar="I/N", help="every N-th cell, from the I-th"
    )
    parser.add_argument("--data", type=Path, default=Path("data"))
    arguments = parser.parse_args()
    arguments.named = arguments.named or arguments.dataset
    part, parts = map(int, arguments.part.split("/"))
    torch.set_num_threads(1)

    settings = parsed_settings(arguments.assign)

    def recipe_of(seed: int):
        return resolve_recipe(
            arguments.dataset, arguments.preset, None, settings, seed, space="nasbench201"
        )

    first = recipe_of(arguments.seeds[0])
    _, images = read_data(first, arguments.data)
    nodes = first.search.nodes
    cells = list(all_cells(nodes))
    table = CellTableFile.open(
        arguments.out,
        space="nasbench201",
        nodes=nodes,
        cells=len(cells),
        seeds=len(arguments.seeds),
        dataset=arguments.named,
        about=head(arguments),
        made_of=made_of(fitted(first, images), images, arguments.seeds),
        more=MORE,
    )
    silent, device = Console(quiet=True), torch.device("cpu")
    for seed in arguments.seeds:
        recipe = fitted(recipe_of(seed), images)
        for cell in cells[part::parts]:
            if (cell.notation(), seed) in table.done:
                continue
            folder = Path(tempfile.mkdtemp(prefix="cell-"))
            begun = time.process_time()
            run = RunFolder.create(folder / "run", recipe)
            result = evaluate_genotype(run, cell, images, silent, device)
            seconds = round(time.process_time() - begun, 2)
            row = Row(
                cell=cell.notation(),
                seed=seed,
                test_error_percent=result["test_error_percent"],
                parameters=result["parameters"],
                multiply_adds_millions=result["multiply_adds_millions"],
            )
            table.append(
                row, training_error_percent=result["training_error_percent"], seconds=seconds
            )
            shutil.rmtree(folder)
            print(row.cell, seed, row.test_error_percent, seconds, file=sys.stderr)


if __name__ == "__main__":
    main()
