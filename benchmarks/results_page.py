"""Makes the figures and tables of the pages of results and of benchmarks, from docs/data.

    make results

A page has blocks between `<!-- begin: NAME -->` and `<!-- end: NAME -->`, which this command fills
by the functions in results_blocks.py. So prose is written by hand, and results never are. New
results: copy the runs.csv of a table to docs/data/runs/NAME.csv, or write a benchmark's `--csv` to
docs/data/benchmarks, and repeat the command.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

from results_blocks import BLOCKS
from results_data import Results, read_all
from results_figures import FIGURES, wanted

from lfmcw_app.errors import InputError

DOCS = Path(__file__).parents[1] / "docs"

BLOCK = re.compile(r"<!-- begin: (.+?) -->\n.*?<!-- end: (.+?) -->\n", re.DOTALL)


def render(text: str, results: Results) -> str:
    """The text of a page with its blocks made anew.

    Raises:
        InputError: if a block has an unknown name, or is not closed.
    """

    def made(match: re.Match[str]) -> str:
        name, closing = match.groups()
        if name not in BLOCKS or name != closing:
            raise InputError(
                f"The page has a block from {name!r} to {closing!r}. A block begins and ends with "
                f"one name of {', '.join(BLOCKS)}."
            )
        return f"<!-- begin: {name} -->\n\n{BLOCKS[name](results)}\n\n<!-- end: {name} -->\n"

    rendered = BLOCK.sub(made, text)
    left = BLOCK.sub("", rendered)
    if "<!-- begin:" in left or "<!-- end:" in left:
        raise InputError("The page has a block that is begun and not ended, or the reverse.")
    return rendered


def pages(docs: Path) -> Iterator[Path]:
    """The pages that have blocks."""
    return (path for path in sorted(docs.glob("*.md")) if BLOCK.search(path.read_text("utf-8")))


def main(docs: Path = DOCS) -> None:
    """Fills the blocks of all pages, and draws the figures."""
    results = read_all(docs / "data")
    for path in pages(docs):
        path.write_text(render(path.read_text("utf-8"), results), "utf-8")
        print(f"{path}: {len(BLOCK.findall(path.read_text('utf-8')))} blocks")
    for name in wanted(results):
        FIGURES[name][1](results, docs / name)
        print(f"{docs / name}: {(docs / name).stat().st_size:,} bytes")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
