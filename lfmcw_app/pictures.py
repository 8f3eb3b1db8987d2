"""Pictures of images: a grid of generated ones beside real ones, a row a class."""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lfmcw_app.data import Dataset
from lfmcw_app.generators import ConditionalDCGAN
from mlo.randomness import preserved

__all__ = ["save_samples"]

GENERATED, REAL = 8, 2
MOST_CLASSES = 20


@torch.no_grad()
def save_samples(generator: ConditionalDCGAN, dataset: Dataset, path: Path, device: torch.device) -> None:
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
    figure = Figure(figsize=(1.6 + 0.62 * (GENERATED + REAL + 1), 0.66 * classes + 0.6), layout="constrained")
    axes = figure.subplots(classes, GENERATED + 1 + REAL, squeeze=False)
    for row in range(classes):
        real = dataset.train.pixels[(dataset.train.labels == row).nonzero()[:REAL, 0]].float() / 255.0
        for column, ax in enumerate(axes[row]):
            ax.axis("off")
            if column < GENERATED:
                _show(ax, generated[row, column])
            elif column > GENERATED and column - GENERATED - 1 < len(real):
                _show(ax, real[column - GENERATED - 1])
        axes[row][0].set_title(f"{dataset.class_names[row]} ", fontsize=9, loc="right", x=-0.1, y=0.25)
    axes[0][GENERATED // 2].annotate(
        "generated", (0.0, 1.15), xycoords="axes fraction", ha="center", fontsize=10, annotation_clip=False
    )
    axes[0][GENERATED + 1].annotate(
        "real", (1.1, 1.15), xycoords="axes fraction", ha="center", fontsize=10, annotation_clip=False
    )
    figure.savefig(path, dpi=110)


def _show(ax: object, image: Tensor) -> None:
    picture = image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
    ax.imshow(picture, cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")  # type: ignore[attr-defined]
