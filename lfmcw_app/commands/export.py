"""`python -m lfmcw_app.export RUN --to FORMAT`: a run's network for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from lfmcw_app.commands.execution import main_of, reported_errors
from lfmcw_app.commands.options import completing
from lfmcw_app.errors import InputError
from lfmcw_app.printing import say
from mlo.errors import nearest


def export(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run folder, or the network.pt of one.")
    ],
    to: Annotated[
        str,
        typer.Option(
            autocompletion=completing("onnx", "torch"),
            help="onnx: for ONNX Runtime and other programs; torch: an exported PyTorch program, "
            "which runs without this package.",
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A new file. By default network.onnx or network.pt2 beside network.pt.",
        ),
    ] = None,
    takes: Annotated[
        str,
        typer.Option(
            "--input",
            autocompletion=completing("pixels", "normalised"),
            help="pixels: the network takes uint8 from 0 to 255 and normalises them itself; "
            "normalised: it takes float32, normalised by the training images' mean and standard "
            "deviation.",
        ),
    ] = "pixels",
) -> None:
    """Writes the trained network of RUN for use without this package.

    The file's output is compared with the network's, on random images and on real ones from the
    run folder. A file that differs by more than rounding is removed.
    """
    # Not needed for `--help`, and slow to import.
    from lfmcw_app.classifier import network_path
    from lfmcw_app.exporting import FORMATS, INPUTS, export_network, real_images
    from lfmcw_app.network_file import NetworkFile

    console = Console()
    with reported_errors(Console(stderr=True)):
        if to not in FORMATS:
            raise InputError(f"Unknown format --to {to!r}. {nearest(to, FORMATS)}")
        if takes not in INPUTS:
            raise InputError(f"Unknown --input {takes!r}. {nearest(takes, INPUTS)}")
        path = network_path(run)
        out = out or path.with_suffix(FORMATS[to].suffix)
        file = NetworkFile.load(path)
        real = real_images(path.parent, file)
        found = export_network(file, to, out, takes=takes, real=real)

        shape = f"[any number, {file.plan.in_channels}, {file.decoding.size}, {file.decoding.size}]"
        values = "uint8 pixels" if takes == "pixels" else "float32, normalised"
        differ = "equal the network's, bit for bit"
        if found.difference:
            differ = f"differ from the network's by at most {found.difference:.1e}"
        say(
            console,
            f"{out}: {shape} of {values} → logits of {len(file.class_names)} classes. On "
            f"{found.images} images, {0 if real is None else len(real)} of them real, its logits "
            f"(up to {found.largest:.3g}) {differ}.",
        )


def main() -> None:
    """Entry point."""
    main_of(export)
