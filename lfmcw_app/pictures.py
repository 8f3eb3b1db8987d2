"""Pictures of generated images beside real ones, one row per class."""

from __future__ import annotations

import copy
import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lfmcw_app.batchnorm import recompute_statistics
from lfmcw_app.conditions import describe_conditions
from lfmcw_app.data import Dataset, Images
from lfmcw_app.drawing import drawing, set_row_names
from lfmcw_app.generators import ImageGenerator
from lfmcw_app.names import FOLDER
from lfmcw_app.run_files import CELLS, DATASET, REAL_IMAGES
from lfmcw_app.run_folder import RunFolder
from lfmcw_app.search_space.genotype import Cells
from lfmcw_app.spaces import space_named
from mlo.randomness import preserved

__all__ = [
    "as_sheet", "describe_dataset", "save_cells", "save_samples", "save_snapshot",
    "snapshot_rounds", "with_settled_statistics",
]  # fmt: skip

GENERATED, REAL = 8, 2
MOST_CLASSES = 20
SNAPSHOTS = 8
STATISTICS_BATCH, STATISTICS_BATCHES = 100, 4
SNAPSHOT_CLASSES, SNAPSHOT_COLUMNS = 10, 2


@torch.no_grad()
def save_samples(
    source: ImageGenerator | Images, dataset: Dataset, path: Path, device: torch.device
) -> None:
    """Draws one row per class (the first 20): generated images, then real ones.

    The generator's statistics and the random state are left as they are.

    Args:
        source: the generator, or the images that are drawn in its place.
        dataset: gives the real images.
        path: of the picture.
        device: where the generator is.
    """
    classes = min(dataset.num_classes, MOST_CLASSES)
    generated = _generated(source, dataset, classes, GENERATED, device)
    real = _first(dataset.train, classes, REAL)
    gap = torch.ones_like(real[:, :1])  # a white column between generated and real images
    _draw_grid(torch.cat([generated, gap, real], dim=1), dataset.class_names[:classes], path)


def snapshot_rounds(rounds: int) -> frozenset[int]:
    """The rounds of a stage after which generated images are kept.

    They are the first, and the ends of its eighths.
    """
    ends = (round(rounds * part / SNAPSHOTS) for part in range(1, SNAPSHOTS + 1))
    return frozenset({1, *(max(1, end) for end in ends)})


@torch.no_grad()
def save_snapshot(
    source: ImageGenerator | Images, dataset: Dataset, path: Path, device: torch.device
) -> None:
    """Saves a sheet of pixels alone: two generated images of each of the first ten classes.

    The noise is the same each time. The generator's statistics and the random state are left as
    they are. See `save_samples`.
    """
    classes = min(dataset.num_classes, SNAPSHOT_CLASSES)
    _save_sheet(_generated(source, dataset, classes, SNAPSHOT_COLUMNS, device), path)


def save_cells(genotype: Cells, folder: RunFolder, title: str) -> None:
    """Draws a genotype's cells into cells.png and cells.svg."""
    for name in CELLS:
        with folder.attempting(name):
            space_named(folder.recipe.search.space).draw(genotype, folder.path / name, title)


def describe_dataset(dataset: Dataset, folder: RunFolder) -> None:
    """Writes dataset.json, and real images in the layout of a snapshot."""
    described: dict[str, Any] = {
        "name": dataset.name,
        "class_names": dataset.class_names,
        "image_size": dataset.image_size,
        "channels": dataset.channels,
        "train_images": len(dataset.train),
        "test_images": len(dataset.test),
        "summary": dataset.summary,
        "fingerprint": dataset.fingerprint.to_data(),
    }
    if conditions := describe_conditions(folder.recipe, dataset):
        described["conditions"] = conditions
    if dataset.validation is not None:
        described["validation_images"] = len(dataset.validation)
    if dataset.name.startswith(FOLDER):  # a relative name means something else in another folder
        place = Path(os.path.expanduser(dataset.name.removeprefix(FOLDER)))
        described["path"] = str(place.resolve())
    folder.write(DATASET, json.dumps(described, indent=1) + "\n")
    if not folder.draws:
        return
    with folder.attempting(REAL_IMAGES):
        classes = min(dataset.num_classes, SNAPSHOT_CLASSES)
        _save_sheet(_first(dataset.train, classes, SNAPSHOT_COLUMNS), folder.path / REAL_IMAGES)


def with_settled_statistics(
    generator: ImageGenerator, num_classes: int, device: torch.device
) -> ImageGenerator:
    """A copy in evaluation mode, with the statistics that its norms have in batches for W2.

    After few rounds the running ones still hold their initial values. Noise is drawn from the
    global random state.
    """
    copied = copy.deepcopy(generator)
    labels = torch.arange(STATISTICS_BATCH, device=device) % num_classes
    passes = (partial(copied.show, labels) for _ in range(STATISTICS_BATCHES))
    recompute_statistics(copied, passes)
    return copied.eval()


def _generated(
    source: ImageGenerator | Images,
    dataset: Dataset,
    classes: int,
    columns: int,
    device: torch.device,
) -> Tensor:
    """Generated images of the first classes with pixels in [0, 1], [classes, columns, C, H, W]."""
    if isinstance(source, Images):
        return _first(source, classes, columns)

    # The same noise every time, so that snapshots of different rounds show what has changed.
    labels = torch.arange(classes).repeat_interleave(columns).to(device)
    with preserved():
        torch.manual_seed(0)
        settled = with_settled_statistics(source, dataset.num_classes, device)
        torch.manual_seed(0)
        images = settled.show(labels).cpu()
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (dataset.mean, dataset.std))
    return (images * std + mean).clamp(0, 1).view(classes, columns, *images.shape[1:])


def _first(images: Images, classes: int, columns: int) -> Tensor:
    """The first images of the first classes, with pixels in [0, 1], [classes, columns, C, H, W].

    Missing images are white.
    """
    rows = []
    for label in range(classes):
        chosen = (images.labels == label).nonzero()[:columns, 0]
        members = images.pixels[chosen].float() / 255.0
        rows.append(F.pad(members, (0, 0, 0, 0, 0, 0, 0, columns - len(members)), value=1.0))
    return torch.stack(rows)


def as_sheet(images: Tensor) -> Tensor:
    """Lays images [rows, columns, C, H, W] side by side, [rows · H, columns · W, C or none]."""
    rows, columns, channels, height, width = images.shape
    pixels = images.permute(0, 3, 1, 4, 2)
    return pixels.reshape(rows * height, columns * width, channels).squeeze(-1)


def _save_sheet(images: Tensor, path: Path) -> None:
    """Saves images [rows, columns, C, H, W] side by side, one pixel per entry in [0, 1]."""
    sheet = as_sheet((images * 255.0).round().to(torch.uint8))
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(sheet.numpy()).save(path)


@drawing()
def _draw_grid(images: Tensor, names: tuple[str, ...], path: Path) -> None:
    """Draws images [rows, columns, C, H, W] in [0, 1], a white line between neighbours."""
    # The lines are a white pixel at the right and at the bottom of each image.
    images = F.pad(images, (0, 1, 0, 1), value=1.0)
    rows, columns, _, height, width = images.shape
    figure = Figure(figsize=(1.4 + 0.6 * columns, 0.5 + 0.6 * rows), layout="constrained")
    ax = figure.subplots()
    sheet = as_sheet(images).numpy()
    ax.imshow(sheet, cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
    set_row_names(ax, [(row + 0.5) * height for row in range(rows)], names)
    middles = [GENERATED / 2 * width, (GENERATED + 1 + REAL / 2) * width]
    ax.set_xticks(middles, labels=["generated", "real"])
    ax.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    ax.spines[:].set_visible(False)
    figure.savefig(path, dpi=110)
