"""`python -m lfmcw_app.report RUN_DIR`: write a run's report, or compare runs on one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lfmcw_app.commands.execution import main_of, reported_errors
from lfmcw_app.errors import InputError
from lfmcw_app.printing import say
from lfmcw_app.run_files import REPORT


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN_DIR", help="Run folders, complete or not.")
    ],
    compare: Annotated[
        bool, typer.Option("--compare", help="Shows the runs side by side, on one page.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help=f"The file. By default {REPORT} in each run folder; with --compare, "
            "comparison.html in the working directory."
        ),
    ] = None,
) -> None:
    """Writes the report of each run as one HTML file, which needs no network connection."""
    # Not needed for `--help`, and slow to import: matplotlib.
    from lfmcw_app.report.page import comparison_page, run_page, write_page
    from lfmcw_app.report.reading import read_run

    console = Console()
    with reported_errors(Console(stderr=True)):
        if compare and len(runs) < 2:
            raise InputError("--compare needs two run folders or more.")
        if out is not None and not compare and len(runs) > 1:
            raise InputError(
                "--out names one file, but there are several runs. Drop it, or put all runs on "
                "one page with --compare."
            )
        read = [read_run(path) for path in runs]
        if compare:
            pages = {out or Path("comparison.html"): comparison_page(read)}
        else:
            pages = {out or run.path / REPORT: run_page(run) for run in read}
        for path, page in pages.items():
            try:
                write_page(page, path)
            except OSError as error:
                raise InputError(
                    f"{path} cannot be written ({error.strerror or error}). Name another file with "
                    "--out."
                ) from None
            say(console, f"{path}")


def main() -> None:
    """Entry point."""
    main_of(report)
