"""`python -m lfmcw_app.evaluate GENOTYPE DATASET`: train the network of a genotype from scratch, report its test error."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console

from lfmcw_app import cli
from lfmcw_app.data import short_name
from lfmcw_app.errors import InputError
from lfmcw_app.processes import check_batches, joined, quiet_unless_main, shared_folder
from lfmcw_app.report import print_result
from lfmcw_app.run_folder import EVALUATED
from lfmcw_app.search_space.genotype import Genotype, random_genotype
from lfmcw_app.search_space.named import NAMED_GENOTYPES, named_genotype
from lfmcw_app.trainer import read_data, train_derived


def evaluate(
    genotype: Annotated[
        str,
        typer.Argument(help=f"A genotype.json, a published one ({', '.join(NAMED_GENOTYPES)}), or random:N."),
    ],
    dataset: Annotated[str, typer.Argument(help=cli.DATASET_HELP)],
    preset: cli.PresetOption = None,
    space: cli.SpaceOption = None,
    config: cli.ConfigOption = None,
    assign: cli.SetOption = None,
    out: Annotated[
        Path | None, typer.Option(help="Run folder, new or empty. By default a new one under runs/.")
    ] = None,
    seed: cli.SeedOption = None,
    data: cli.DataOption = Path("data"),
    device: cli.DeviceOption = "auto",
    threads: cli.ThreadsOption = None,
) -> None:
    """Trains the network of GENOTYPE on DATASET from scratch, as the recipe's evaluation says, and reports its error."""
    console = Console()
    with cli.reported_errors(Console(stderr=True)):
        if threads is not None:
            torch.set_num_threads(threads)
        recipe = cli.resolve_recipe(dataset, preset, config, assign, seed, space=space)
        cells = _read_genotype(genotype, recipe.search.nodes)
        check_batches(recipe, searches=False)
        with joined(cli.pick_device(device)) as target:
            console = quiet_unless_main(console)
            images = read_data(recipe, data, searches=False)
            name = f"{short_name(dataset)}-{recipe.preset}-evaluation"
            folder = shared_folder(None, out or cli.fresh_folder(name), recipe)
            folder.write(EVALUATED, cells.to_json())
            console.print(f"Run folder: {folder.path}", highlight=False, soft_wrap=True, markup=False)
            print_result(train_derived(folder, cells, images, console, target), folder, console)


def _read_genotype(text: str, nodes: int) -> Genotype:
    kind, colon, number = text.partition(":")
    if text in NAMED_GENOTYPES:
        return NAMED_GENOTYPES[text]
    if not colon or kind != "random":
        # A name that is neither a file nor published is more likely a mistyped name.
        return Genotype.load(text) if Path(text).suffix or Path(text).exists() else named_genotype(text)
    if not number.isascii() or not number.isdecimal() or int(number) >= 2**62:
        raise InputError(f"A random genotype is random:N with a whole number N below 2**62, got {text!r}.")
    return random_genotype(nodes, int(number))


def main() -> None:
    """Entry point."""
    cli.main(evaluate)


if __name__ == "__main__":
    main()
