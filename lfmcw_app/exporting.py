"""A trained network for programs without this package: ONNX, or PyTorch's exported program.

Both take any number of images at a time, and are compared with the network before they are kept.
The file itself describes the input and names the classes: in ONNX's `metadata_props`, or in
PyTorch's extra file `lfmcw.json` (`torch.export.load(path, extra_files={"lfmcw.json": ""})`).
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lfmcw_app.classifier import Classifier, Preprocess
from lfmcw_app.decoding import DamagedImage, opened
from lfmcw_app.errors import InputError
from lfmcw_app.network_file import NetworkFile
from lfmcw_app.output_files import new_file
from lfmcw_app.run_files import REAL_IMAGES

__all__ = [
    "FORMATS", "INPUTS", "Comparison", "Format", "check_packages", "export_network", "real_images",
]  # fmt: skip

METADATA = "lfmcw.json"
INPUTS = ("pixels", "normalised")
"""What an exported network takes: pixels from 0 to 255, or the output of `preprocess`."""

Run = Callable[[Tensor], Tensor]

TOLERANCE = 1e-4
"""Largest difference that counts as rounding, as a share of the largest logit (at least 1)."""

COUNTS = (1, 2, 5)
"""Images at a time in the comparison."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format of exported networks.

    Attributes:
        suffix: of its files.
        packages: what writing and comparing it needs beside PyTorch.
        write: (network, example input, metadata, path) writes the file.
        read: a file → a function from inputs to logits, for the comparison.
    """

    suffix: str
    packages: tuple[str, ...]
    write: Callable[[nn.Module, Tensor, Mapping[str, str], Path], None]
    read: Callable[[Path], Run]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A comparison of an exported network with the original.

    Attributes:
        images: how many were compared.
        difference: largest difference of a logit.
        largest: largest absolute value of a logit.
    """

    images: int
    difference: float
    largest: float

    @property
    def is_equal(self) -> bool:
        """Whether the difference is one of rounding."""
        return self.difference <= TOLERANCE * max(1.0, self.largest)  # False for NaN


class FromPixels(nn.Module):
    """A network that takes pixels from 0 to 255 and normalises them."""

    mean: Tensor
    std: Tensor

    def __init__(self, classifier: Classifier, preprocess: Preprocess) -> None:
        super().__init__()
        self.classifier = classifier
        for name in ("mean", "std"):
            values = torch.tensor(getattr(preprocess, name)).view(-1, 1, 1)
            self.register_buffer(name, values)

    def forward(self, pixels: Tensor) -> Tensor:
        """Returns the logits [B, classes] of `pixels` [B, C, S, S], uint8."""
        logits: Tensor = self.classifier((pixels.float() / 255.0 - self.mean) / self.std)
        return logits


def export_network(
    file: NetworkFile,
    kind: str,
    path: Path,
    *,
    takes: str = "pixels",
    real: Tensor | None = None,
) -> Comparison:
    """Exports a network, and compares the file's logits with the original's.

    Args:
        file: the network.
        kind: one of `FORMATS`.
        path: where to; a new file.
        takes: one of `INPUTS`.
        real: images that are compared beside random ones, [N, C, S, S], uint8.

    Raises:
        InputError: if a package is missing, the network draws random numbers, the file exists or
            cannot be written, or the exported network is not equal; nothing is left of it then.
    """
    check_packages(kind)
    how = FORMATS[kind]
    preprocess = Preprocess(decoding=file.decoding, mean=file.mean, std=file.std)
    classifier = Classifier(file.network()).eval()
    network = FromPixels(classifier, preprocess).eval() if takes == "pixels" else classifier
    batches = _batches(file, real)
    inputs = batches if takes == "pixels" else [preprocess.normalised(batch) for batch in batches]
    _check_repeats(network, inputs[-1])
    with new_file(path) as temporary:
        with _quiet():
            how.write(network, inputs[1], _metadata(file, takes), temporary)
            found = _compared(network, how.read(temporary), inputs)
        if not found.is_equal:
            raise InputError(
                f"The exported network is not the original: logits of up to {found.largest:.3g} "
                f"differ by {found.difference:.3g}. The file was removed. Please report it, with "
                "the versions of torch and of the packages of the format."
            )
    return found


def real_images(folder: Path, file: NetworkFile) -> Tensor | None:
    """The real images that a run keeps beside its generated ones, [N, C, S, S], uint8.

    None where there is no such sheet, or it is not one of this network's images.
    """
    try:
        with opened(folder / REAL_IMAGES) as image:
            sheet = np.array(image)
    except DamagedImage:
        return None
    channels, size = file.plan.in_channels, file.decoding.size
    sheet = sheet.reshape(*sheet.shape[:2], -1)
    rows, columns = sheet.shape[0] // size, sheet.shape[1] // size
    if sheet.shape != (rows * size, columns * size, channels) or sheet.dtype != np.uint8:
        return None
    tiles = sheet.reshape(rows, size, columns, size, channels).transpose(0, 2, 4, 1, 3)
    return torch.from_numpy(tiles.reshape(-1, channels, size, size).copy())


def check_packages(kind: str) -> None:
    """Checks that what a format needs is installed.

    Raises:
        InputError: with the command that installs it.
    """
    missing = []
    for name in FORMATS[kind].packages:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        raise InputError(
            f"--to {kind} needs {', '.join(missing)}, which cannot be imported here: pip install "
            "'torch-mlo[export]' (in a checkout: '.[export]'). --to torch needs no other package."
        )


def _batches(file: NetworkFile, real: Tensor | None) -> list[Tensor]:
    """Images to compare, [B, C, S, S], uint8: random ones in batches of several sizes."""
    generator = torch.Generator().manual_seed(0)
    size = file.decoding.size
    batches = [
        torch.randint(
            256, (count, file.plan.in_channels, size, size), generator=generator, dtype=torch.uint8
        )
        for count in COUNTS
    ]
    return batches if real is None else [*batches, *torch.split(real, 16)]


@torch.no_grad()
def _check_repeats(network: nn.Module, images: Tensor) -> None:
    if not torch.equal(network(images), network(images)):
        raise InputError(
            "The network cannot be exported: its output differs from one call to the next, since "
            "one of its operations draws random numbers (noise does). Train a cell without it."
        )


@torch.no_grad()
def _compared(network: nn.Module, exported: Run, inputs: list[Tensor]) -> Comparison:
    difference, largest = 0.0, 0.0
    for batch in inputs:
        expected, found = network(batch), exported(batch)
        difference = max(difference, float((expected - found).abs().max()), key=_or_nan)
        largest = max(largest, float(expected.abs().max()))
    return Comparison(images=sum(map(len, inputs)), difference=difference, largest=largest)


def _or_nan(value: float) -> float:
    """A key by which NaN is the largest of all."""
    return float("inf") if value != value else value


def _metadata(file: NetworkFile, takes: str) -> dict[str, str]:
    """What a program must know about the network, as JSON texts."""
    size = file.decoding.size
    described: dict[str, Any] = {
        "class_names": file.class_names,
        "input": {
            "name": "images",
            "shape": ["batch", file.plan.in_channels, size, size],
            "values": "uint8, 0 to 255" if takes == "pixels" else "float32, (x / 255 - mean) / std",
        },
        "output": {"name": "logits", "shape": ["batch", len(file.class_names)]},
        "mean": file.mean,
        "std": file.std,
        "decoding": file.decoding.to_data(),
        "about": dict(file.about),
    }
    return {key: json.dumps(value) for key, value in described.items()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hides the exporters' own progress and advice, which are for developers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "torch.export")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# ------------------------------ the formats


def _write_torch(
    network: nn.Module, example: Tensor, metadata: Mapping[str, str], path: Path
) -> None:
    program = torch.export.export(network, (example,), dynamic_shapes=(_ANY_NUMBER,))
    described = {key: json.loads(value) for key, value in metadata.items()}
    # Made in memory: PyTorch's own writer of files ends the process on a full disk.
    buffer = io.BytesIO()
    torch.export.save(program, buffer, extra_files={METADATA: json.dumps(described, indent=1)})
    path.write_bytes(buffer.getbuffer())


def _read_torch(path: Path) -> Run:
    run: Run = torch.export.load(path).module()
    return run


def _write_onnx(
    network: nn.Module, example: Tensor, metadata: Mapping[str, str], path: Path
) -> None:
    program = torch.onnx.export(
        network,
        (example,),
        dynamo=True,
        dynamic_shapes=(_ANY_NUMBER,),
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update(metadata)
    program.save(path, external_data=False)


def _read_onnx(path: Path) -> Run:
    runtime = importlib.import_module("onnxruntime")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    return run


_ANY_NUMBER = {0: torch.export.Dim("batch")}
"""The dimension of the input that may have any size: the first."""

FORMATS: dict[str, Format] = {
    "torch": Format(suffix=".pt2", packages=(), write=_write_torch, read=_read_torch),
    "onnx": Format(
        suffix=".onnx",
        packages=("onnx", "onnxscript", "onnxruntime"),
        write=_write_onnx,
        read=_read_onnx,
    ),
}
"""Name → format; `--to` takes the names."""
