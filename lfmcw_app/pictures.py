"""Pictures of images: a grid of generated ones beside real ones, a row a class."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from lfmcw_app.data import Dataset
from lfmcw_app.generators import ImageGenerator
from mlo.randomness import preserved

__all__ = ["save_samples"]

GENERATED, REAL = 8, 2
MOST_CLASSES = 20


@torch.no_grad()
def save_samples(generator: ImageGenerator, dataset: Dataset, path: Path, device: torch.device) -> None:
    """Draws a grid with a row for each class (the first 20): generated images, and real ones at the right.

    The generator's statistics and the random state are left as they are.
    """
    classes = min(dataset.num_classes, MOST_CLASSES)
    labels = torch.arange(classes).repeat_interleave(GENERATED).to(device)
    was_training = generator.training
    with preserved():
        torch.manual_seed(0)
        images = generator.eval().sample(labels).cpu()
    generator.train(was_training)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (dataset.mean, dataset.std))
    generated = (images * std + mean).clamp(0, 1).view(classes, GENERATED, *images.shape[1:])
    rows = []
    for label in range(classes):
        members = dataset.train.pixels[(dataset.train.labels == label).nonzero()[:REAL, 0]].float() / 255.0
        real = F.pad(members, (0, 0, 0, 0, 0, 0, 0, REAL - len(members)), value=1.0)
        rows.append(torch.cat([generated[label], torch.ones_like(real[:1]), real]))
    _draw_grid(torch.stack(rows), dataset.class_names[:classes], path)


def _draw_grid(images: Tensor, names: tuple[str, ...], path: Path) -> None:
    """Draws images [rows, columns, C, H, W] with pixels in [0, 1], a white line between neighbours."""
    images = F.pad(images, (0, 1, 0, 1), value=1.0)
    rows, columns, channels, height, width = images.shape
    sheet = images.permute(0, 3, 1, 4, 2).reshape(rows * height, columns * width, channels)
    figure = Figure(figsize=(1.4 + 0.6 * columns, 0.5 + 0.6 * rows), layout="constrained")
    ax = figure.subplots()
    ax.imshow(sheet.squeeze(-1).numpy(), cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
    ax.set_yticks([(row + 0.5) * height for row in range(rows)], labels=list(names))
    ax.set_xticks([GENERATED / 2 * width, (GENERATED + 1 + REAL / 2) * width], labels=["generated", "real"])
    ax.tick_params(length=0, top=True, labeltop=True, bottom=False, labelbottom=False)
    ax.spines[:].set_visible(False)
    figure.savefig(path, dpi=110)
