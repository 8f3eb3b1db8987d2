"""Pictures inside the page, as data: sheets of images, and the heat map of the class weights."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from PIL import Image

from lfmcw_app.decoding import opened
from lfmcw_app.report.reading import RunData
from lfmcw_app.units import text_units

__all__ = [
    "ClassWeights",
    "Sheet",
    "class_weights",
    "data_url",
    "gradient_bar",
    "last_class_weights",
    "sheets",
    "tile_size",
    "weights_of_rounds",
]

MOST_ROWS = 30
MOST_COLUMNS = 240
LARGEST_TILE = 40
LEAST_TILE = 28
NAME_LINE, NAME_UNITS = 15, 15
"""Beside a sheet: pixels of a line of a name, and letters in it."""
MOST_NAME_LINES = 20
LOSSLESS_BYTES = 20_000
COLOURS = "viridis"


@dataclass(frozen=True, kw_only=True)
class Sheet:
    """Images of some classes, one row per class.

    Attributes:
        phase: the stage of the search, or the warm-up, where there are several.
        label: its round, or "real".
        real: whether they are real training images.
        source: the picture, as a data URL.
        rows: classes.
        columns: images of each.
    """

    phase: str
    label: str
    source: str
    rows: int
    columns: int
    real: bool = False


@dataclass(frozen=True, kw_only=True)
class ClassWeights:
    """The class weights l_c through the rounds.

    Attributes:
        names: of the classes in the picture.
        first: of each, the mean over the first tenth of the rounds.
        last: of each, the mean over the last tenth of the rounds.
        averaged: how many rounds that is.
        sources: of each, a picture one pixel high, as a data URL.
        low: the value of the darkest colour.
        high: of the brightest.
        classes: of the data set; those with the smallest last weights are left out where there are
            many.
    """

    names: Sequence[str]
    first: Sequence[float]
    last: Sequence[float]
    averaged: int
    sources: Sequence[str]
    low: float
    high: float
    classes: int


def class_weights(run: RunData) -> ClassWeights | None:
    """The heat map of a run's class weights; None where there are none (plain DARTS)."""
    values = weights_of_rounds(run)
    if values is None:
        return None
    last = _last(values)
    names = class_names(run, len(values))

    # The classes that weigh most in the end, and as many columns as a screen shows: each is a mean.
    shown = sorted(np.argsort(-last, kind="stable")[:MOST_ROWS].tolist())
    parts = np.array_split(values[shown], min(values.shape[1], MOST_COLUMNS), axis=1)
    picture = np.stack([part.mean(axis=1) for part in parts], axis=1)
    low, high = float(picture.min()), float(picture.max())
    # Equal weights have no span to divide by.
    coloured = colormaps[COLOURS]((picture - low) / (high - low or 1.0), bytes=True)[:, :, :3]
    first = values[:, : _tenth(values)].mean(axis=1)
    return ClassWeights(
        names=[names[index] for index in shown],
        first=[float(first[index]) for index in shown],
        last=[float(last[index]) for index in shown],
        averaged=_tenth(values),
        sources=[data_url(Image.fromarray(np.ascontiguousarray(row[None]))) for row in coloured],
        low=low,
        high=high,
        classes=len(values),
    )


def last_class_weights(run: RunData) -> list[float] | None:
    """Each class's weight at the end of the search: the mean over the last tenth of the rounds."""
    values = weights_of_rounds(run)
    return None if values is None else [float(value) for value in _last(values)]


def weights_of_rounds(run: RunData) -> np.ndarray | None:
    """The class weights, [classes, rounds]."""
    rows = [
        entry["metrics"]["w2"]["class_weights"]
        for stage in run.searched
        for entry in stage.entries
        if "class_weights" in entry["metrics"].get("w2", {})
    ]
    return np.array(rows, dtype=float).T if rows else None


def _last(values: np.ndarray) -> np.ndarray:
    last: np.ndarray = values[:, -_tenth(values) :].mean(axis=1)
    return last


def _tenth(values: np.ndarray) -> int:
    return max(1, int(values.shape[1]) // 10)


def class_names(run: RunData, count: int) -> list[str]:
    """The names of the classes, or their numbers where the run folder does not tell them."""
    names: list[Any] = run.dataset.get("class_names", [])
    return list(map(str, names if len(names) == count else range(count)))


def gradient_bar() -> str:
    """The heat map's colours from low to high, as CSS."""
    stops = (colormaps[COLOURS](index / 8, bytes=True) for index in range(9))
    return f"linear-gradient(90deg,{','.join(f'rgb({r},{g},{b})' for r, g, b, _ in stops)})"


def sheets(run: RunData) -> tuple[list[str], list[Sheet]]:
    """The names of the classes, and the sheets.

    What people look for comes first: the last round, beside real images. The other rounds follow.
    """
    size = run.dataset.get("image_size")
    if run.real is None or not size:
        return [], []
    several = len({shot.phase for shot in run.snapshots}) > 1
    found = [
        _sheet(shot.phase if several else "", str(shot.round), shot.path, size)
        for shot in run.snapshots
    ]
    if not found:
        return [], []
    ordered = [found[-1], replace(_sheet("", "real", run.real, size), real=True), *found[:-1]]
    return class_names(run, len(run.dataset["class_names"]))[: found[0].rows], ordered


def tile_size(names: Sequence[str]) -> int:
    """Pixels of an image of a sheet, so that the longest name beside it is seen as a whole."""
    lines = max((math.ceil(text_units(name) / NAME_UNITS) for name in names), default=1)
    # Lines break at spaces, so they are not all full.
    lines += lines > 1
    return max(LEAST_TILE, NAME_LINE * min(lines, MOST_NAME_LINES))


def _sheet(phase: str, label: str, path: Path, size: int) -> Sheet:
    with opened(path) as image:
        columns, rows = image.width // size, image.height // size
        if size > LARGEST_TILE:
            size = LARGEST_TILE
            image = image.resize((columns * size, rows * size), Image.Resampling.LANCZOS)
        image = _parted(image, size, rows, columns)
        return Sheet(phase=phase, label=label, source=data_url(image), rows=rows, columns=columns)


def _parted(image: Image.Image, size: int, rows: int, columns: int) -> Image.Image:
    """The images of a sheet with a gap to the right of each and below it, which shows the page."""
    pitch = size + max(1, size // 16)
    parted = Image.new("RGBA", (columns * pitch, rows * pitch), (0, 0, 0, 0))
    for row, column in product(range(rows), range(columns)):
        left, top = column * size, row * size
        tile = image.crop((left, top, left + size, top + size)).convert("RGBA")
        parted.paste(tile, (column * pitch, row * pitch))
    return parted


def data_url(image: Image.Image) -> str:
    """A picture as a data URL: exact if that is small, otherwise nearly exact."""
    # PNG is exact; where it is too large for a page, WebP is small and nearly the same.
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    kind = "png"
    if buffer.tell() > LOSSLESS_BYTES:
        buffer, kind = io.BytesIO(), "webp"
        image.save(buffer, "WEBP", quality=85)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
