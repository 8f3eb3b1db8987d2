"""Pictures whose class is plain to see, and generators of them that are good or bad in one way."""

from __future__ import annotations

import torch

from lfmcw_app.data import Dataset, Images
from lfmcw_app.generators import ImageGenerator

CLASSES, SIZE = 4, 8
MEAN, STD = 0.3, 0.25


def drawn(labels, generator=None):
    """Pictures of a bar, in [0, 1], [B, 1, 8, 8]: its place says the class, its rest is chance."""
    count = len(labels)
    images = 0.3 * torch.rand(count, 1, SIZE, SIZE, generator=generator)
    bright = 0.4 + 0.3 * torch.rand(count, 1, 2, SIZE, generator=generator)
    for image, bar, label in zip(images, bright, labels.tolist(), strict=True):
        image[:, 2 * label : 2 * label + 2] += bar
    return images


def bars(per_class=60, seed=0, classes=CLASSES):
    """A data set of such pictures."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(per_class * classes) % classes
    pixels = (255 * drawn(labels, generator)).round().to(torch.uint8)
    images = Images(pixels=pixels, labels=labels)
    return Dataset(
        name="bars",
        train=images,
        test=images,
        class_names=tuple(f"bar {label}" for label in range(classes)),
        mean=(MEAN,),
        std=(STD,),
    )


class Made(ImageGenerator):
    """A generator that draws by a function of labels, whose pictures [B, 1, 8, 8] are in [0, 1]."""

    def __init__(self, draw) -> None:
        super().__init__(noise_dim=2, image_channels=1, mean=(MEAN,), std=(STD,))
        self.draw = draw

    def pixels(self, noise, labels):
        """In [-1, 1]."""
        return 2.0 * self.draw(labels) - 1.0


def one_per_class(labels):
    """The same picture each time."""
    return drawn(torch.arange(CLASSES), torch.Generator().manual_seed(5))[labels]


def marked_noise(labels):
    """Noise with a pixel that says the class, at a place that says nothing in real pictures."""
    images = torch.rand(len(labels), 1, SIZE, SIZE)
    images[torch.arange(len(labels)), 0, labels % SIZE, 0] = 3.0
    images[torch.arange(len(labels)), 0, 7 - labels % SIZE, 7] = 3.0
    return images


def constant(labels):
    """One picture for all classes."""
    return torch.full((len(labels), 1, SIZE, SIZE), 0.5)


def wrong_class(labels):
    """Good pictures of the next class."""
    return drawn((labels + 1) % CLASSES)
