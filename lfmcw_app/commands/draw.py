"""`python -m lfmcw_app.draw GENOTYPE --out FILE`: a picture of a genotype's cells."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lfmcw_app.commands import options
from lfmcw_app.commands.execution import main_of, reported_errors
from lfmcw_app.errors import InputError, shown
from lfmcw_app.genotype_argument import GENOTYPE_HELP, read_genotype
from lfmcw_app.printing import say
from lfmcw_app.recipe_loading import load_recipe
from lfmcw_app.run_files import CONFIG
from lfmcw_app.run_folder import RunFolder
from lfmcw_app.search_space.named import NAMED_GENOTYPES
from lfmcw_app.spaces import Settings, space_named

FORMATS = (".png", ".svg", ".pdf")


def draw(
    genotype: Annotated[
        str,
        typer.Argument(
            autocompletion=options.completing(*NAMED_GENOTYPES, "random:"), help=GENOTYPE_HELP
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help=f"A new file that ends in {', '.join(FORMATS)}; by default one in the working "
            "directory.",
        ),
    ] = Path("cells.png"),
    title: Annotated[str, typer.Option(help="Text above the cells.")] = "",
    nodes: Annotated[int, typer.Option(min=1, max=12, help="Nodes of a random genotype.")] = 4,
    space: options.SpaceOption = None,
) -> None:
    """Draws the cells of GENOTYPE, and prints them in the space's notation."""
    # matplotlib takes a second to import, and `--help` does not need it.
    from lfmcw_app.output_files import new_file

    console = Console()
    with reported_errors(Console(stderr=True)):
        if out.suffix.lower() not in FORMATS:
            raise InputError(f"--out must end in {', '.join(FORMATS)}, got {shown(str(out))}.")
        how = _settings(genotype, space, nodes)
        cells = read_genotype(genotype, how)
        with new_file(out) as path:
            space_named(how.space).draw(cells, path, title)
        for text in (cells.notation(), f"Picture of the cells: {out}"):
            say(console, text)


def _settings(genotype: str, space: str | None, nodes: int) -> Settings:
    """The settings of the named run, or of the options."""
    if (Path(genotype) / CONFIG).is_file():
        return RunFolder.open(Path(genotype)).recipe.search
    return load_recipe("smoke", space=space or "darts", overrides={"search.nodes": nodes}).search


def main() -> None:
    """Entry point."""
    main_of(draw)
