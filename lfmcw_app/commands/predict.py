"""`python -m lfmcw_app.predict RUN IMAGE...`: the classes that a run's network predicts."""

from __future__ import annotations

import codecs
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from lfmcw_app.bounded_files import bytes_of
from lfmcw_app.commands.execution import main_of, reported_errors
from lfmcw_app.commands.options import DeviceOption, pick_device
from lfmcw_app.errors import InputError, listed
from lfmcw_app.near_paths import near_paths
from lfmcw_app.printing import printable, say

if TYPE_CHECKING:
    from lfmcw_app.prediction import ImageFile
    from lfmcw_app.trained_images import TrainedImages

NAMED = 10
"""Maximum number of unreadable images that are named; JSON and CSV have all of them."""

LONGEST_LIST = 2**28
"""Bytes of a list of images: some millions of paths."""

UNREADABLE_CODE = 1
"""Exit code if some images could not be read and the others were predicted."""


def predict(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run folder, or the network.pt of one.")
    ],
    images: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="IMAGE",
            help="Files, and folders with everything below them. If folders are named after "
            "classes, the error is printed too.",
        ),
    ] = None,
    list_file: Annotated[
        Path | None,
        typer.Option(
            "--list",
            metavar="FILE",
            help="Text file with more images, one per line; - for standard input.",
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, help="Classes per image.")] = 3,
    as_json: Annotated[
        bool, typer.Option("--json", help="Prints JSON, and nothing else, to standard output.")
    ] = False,
    csv: Annotated[
        Path | None, typer.Option(metavar="FILE.csv", help="Also writes a table for programs.")
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png", help="Also draws the first images, with their classes as bars."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 64,
    held_out: Annotated[
        bool,
        typer.Option(
            "--held-out",
            help="Only images that the network was not trained on. Without IMAGE: those of the "
            "run's own folder of pictures.",
        ),
    ] = False,
    device: DeviceOption = "auto",
) -> None:
    """Predicts the classes of images with the trained network of RUN.

    The exit code is 0 if all images were predicted, 1 if some could not be read (they are named,
    and the others predicted), and 2 if nothing could be predicted. Damaged files of the run's own
    folder do not count if the run skips such files.
    """
    # Not needed for `--help`, and slow to import.
    from lfmcw_app import prediction, prediction_output
    from lfmcw_app.classifier import load_network, network_path
    from lfmcw_app.output_files import check_new, new_file

    console, errors = Console(), Console(stderr=True)
    with reported_errors(errors):
        target = pick_device(device)
        for path in (csv, picture):
            if path is not None:
                check_new(path)
        if picture is not None and picture.suffix.lower() != ".png":
            raise InputError(f"--picture {picture}: it is drawn as PNG, so name it FILE.png.")
        sources = [*(images or []), *(_lines(list_file) if list_file is not None else [])]
        if not sources and not held_out:
            raise InputError(
                "Name images or folders of images, or a text file of them with --list; or give "
                "--held-out alone, for the run's own pictures that it was not trained on."
            )
        network, preprocess, class_names = load_network(run, device=target)
        trained, unknown = _trained_images(network_path(run).parent, needed=held_out)
        if not sources:
            sources = [_own_pictures(trained)]
        found = prediction.find_images(sources, class_names)
        if found.ambiguous:
            names = listed(list(map(str, found.ambiguous)))
            say(
                errors,
                f"Images in the folders of several classes, under several names: {names}. They do "
                "not count in the error.",
            )
        chosen = found.images if trained is None else trained.marked(found.images)
        if held_out:
            chosen = _held_out(chosen)
        made = prediction.predict(network, preprocess, class_names, chosen, batch_size=batch_size)
        if made.failed and not made.done:
            told = _reasons(made.failed)
            raise InputError(f"None of the {len(chosen):,} images can be read: {told}.")
        left_out = {} if trained is None else _left_out(trained, made.failed)
        failed = {path: why for path, why in made.failed.items() if path not in left_out}
        for kind, files in (
            ("[bold]Skipped, as in the run:[/]", left_out),
            ("[bold red]Not predicted:[/]", failed),
        ):
            if files:
                errors.print(kind, end=" ")
                errors.print(
                    printable(_reasons(files)),
                    highlight=False,
                    markup=False,
                    soft_wrap=not errors.is_terminal,
                )
        if top > len(class_names):
            say(errors, f"--top {top}: the network has {len(class_names)} classes; all are given.")

        # What may fail comes last: it costs nothing that was made before it.
        if as_json:
            data = prediction_output.as_data(made, top)
            print(json.dumps({"run": str(run), **data}, indent=1))
        else:
            prediction_output.print_predictions(made, top, console)
            if told := prediction_output.describe_trained_on(made, unknown):
                say(console, told)
            if found.skipped:
                kinds = ", ".join(f"{kind} {number:,}" for kind, number in found.skipped.items())
                say(console, f"files that are not images: {kinds}")
        if csv is not None:
            with new_file(csv) as path:
                text = prediction_output.as_csv(made, top)
                path.write_bytes(text.encode("utf-8", "surrogateescape"))  # names as they are
        if picture is not None:
            with new_file(picture) as path:
                prediction_output.draw(made, preprocess, top, path)
        if failed:
            raise typer.Exit(UNREADABLE_CODE)


def _left_out(trained: TrainedImages, failed: Mapping[Path, str]) -> dict[Path, str]:
    """Those of the files that cannot be read which the run was told to skip."""
    return {path: why for path, why in failed.items() if trained.skips(path)}


def _reasons(files: Mapping[Path, str]) -> str:
    """Files with the reasons why they cannot be read, the first few."""
    return listed([f"{path} ({why})" for path, why in files.items()], most=NAMED)


def _trained_images(run: Path, *, needed: bool) -> tuple[TrainedImages | None, str]:
    """The images that a run was trained on, or None and why they are unknown.

    Raises:
        InputError: if they are needed and unknown.
    """
    from lfmcw_app.trained_images import TrainedImages

    try:
        return TrainedImages.of(run), ""
    except InputError as error:
        if needed:
            raise InputError(
                f"--held-out: it is unknown which images the network was trained on. {error} Drop "
                "--held-out, and name images that are new to it."
            ) from None
        return None, str(error)


def _own_pictures(trained: TrainedImages | None) -> Path:
    """The folder of pictures of a run.

    Raises:
        InputError: if it is no longer in its place.
    """
    if trained is None or trained.folder is None:
        raise InputError(
            "--held-out: the run's folder of pictures is no longer where it was. Name the folder's "
            "new place after the run, as IMAGE."
        )
    return trained.folder


def _held_out(images: Sequence[ImageFile]) -> tuple[ImageFile, ...]:
    """The images that the network was not trained on.

    Raises:
        InputError: if there are none.
    """
    chosen = tuple(image for image in images if not image.trained_on)
    if not chosen:
        raise InputError(
            f"--held-out: the network was trained on all of these {len(images):,} images. Name "
            "others, or --held-out alone for the run's own pictures that it was not trained on."
        )
    return chosen


def _lines(path: Path) -> list[Path]:
    """The paths in a text file, or in standard input for "-", one per line, without empty lines.

    They are bytes, as the names of files are. After `find -print0`, zero bytes end them.

    Raises:
        InputError: if it cannot be read.
    """
    try:
        if str(path) == "-":
            content = sys.stdin.buffer.read()
        else:
            content = bytes_of(path, LONGEST_LIST, pipes=True)
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        near = "" if os.path.exists(path) else near_paths(path, os.path.isfile)
        raise InputError(f"--list: {path} cannot be read ({why}).{near}") from None
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise InputError(f"--list: {path} is text in UTF-16. Save it in UTF-8.")
    content = content.removeprefix(codecs.BOM_UTF8)
    lines = content.split(b"\0") if b"\0" in content else content.splitlines()
    try:
        return [_path_in(line) for line in lines if line.strip()]
    except UnicodeDecodeError:  # on Windows, where names of files are text
        raise InputError(f"--list: {path} is no text in UTF-8. Save it in UTF-8.") from None


def _path_in(line: bytes) -> Path:
    """The path in a line, without the blanks around it unless they belong to a file's name."""
    whole = Path(os.fsdecode(line))
    return whole if os.path.exists(whole) else Path(os.fsdecode(line.strip()))


def main() -> None:
    """Entry point."""
    main_of(predict)
