"""`python -m lfmcw_app.sample RUN`: more images from a run's generator."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lfmcw_app.commands.execution import main_of, reported_errors
from lfmcw_app.commands.options import DeviceOption, pick_device
from lfmcw_app.errors import InputError, listed
from lfmcw_app.printing import say


def sample(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="Run folder of a search, which may still be running."),
    ],
    out: Annotated[
        Path,
        typer.Option(
            metavar="FILE.png|FOLDER",
            help="A new PNG file for a sheet of all images, or a new folder for one file per "
            "image at FOLDER/CLASS/0000.png, as folder:FOLDER reads them.",
        ),
    ],
    classes: Annotated[
        list[str] | None,
        typer.Option(
            "--class",
            metavar="NAME",
            help="Only this class. Can be repeated. By default all classes.",
        ),
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Images per class.")] = 16,
    seed: Annotated[int, typer.Option(min=0, max=2**40, help="Seed of the noise.")] = 0,
    device: DeviceOption = "auto",
) -> None:
    """Draws images from the last saved generator of the search in RUN.

    Image k of a class depends on the seed alone, not on the count or the other classes.
    """
    # Not needed for `--help`, and slow to import.
    from lfmcw_app.folders import image_suffixes
    from lfmcw_app.output_files import check_new, new_file
    from lfmcw_app.sampling import (
        MOST_ON_A_SHEET,
        draw_sheet,
        load_generator,
        measured_quality,
        save_images,
    )

    console = Console()
    with reported_errors(Console(stderr=True)):
        target = pick_device(device)
        check_new(out)
        is_sheet = out.suffix.lower() == ".png"
        if not is_sheet and out.suffix.lower() in image_suffixes():
            raise InputError(
                f"--out {out}: a sheet of images is a PNG file, named FILE.png; any other name is "
                f"that of a folder, which should not end in {out.suffix}."
            )
        trained = load_generator(run, target)
        names = list(dict.fromkeys(classes or trained.class_names))
        labels = [trained.label(name) for name in names]
        if is_sheet and len(names) * count > MOST_ON_A_SHEET:
            raise InputError(
                f"{len(names) * count:,} images are too many for one sheet (at most "
                f"{MOST_ON_A_SHEET:,}). Lower --count, or name a folder with --out."
            )
        images = {
            name: trained.images(label, count, seed)
            for name, label in zip(names, labels, strict=True)
        }
        if is_sheet:
            with new_file(out) as path:
                draw_sheet(images, path)
        else:
            save_images(images, out)
        say(
            console,
            f"{out}: {sum(map(len, images.values())):,} images of {listed(names)}, from the "
            f"generator after round {trained.rounds:,} of {trained.stage}",
        )
        measured = measured_quality(run, trained)
        if measured is not None:
            number, quality, doubts = measured
            say(console, f"Measured after round {number:,}: {quality}")
            for doubt in doubts:
                console.print("[bold yellow]Doubtful:[/]", end=" ")
                say(console, doubt)


def main() -> None:
    """Entry point."""
    main_of(sample)
