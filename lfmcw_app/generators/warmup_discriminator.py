"""The discriminator of a generator's warm-up: small, convolutional, and not searched.

The warm-up is not part of the paper. It learns no architecture, so the discriminator need not have
one. A step of this one costs a fraction of a step of a supernet.
"""

from __future__ import annotations

from torch import Tensor, nn

from lfmcw_app.generators.blocks import normalize_spectrally
from lfmcw_app.generators.two_sided_augmentation import augmented_alike

__all__ = ["WarmupDiscriminator"]

SMALLEST = 4
"""Height and width of the last features, at least."""


class WarmupDiscriminator(nn.Module):
    """Scores whether an image of a class is real: high for real, low for generated.

    Convolutions of stride 2 with LeakyReLU, spectral norm, and a class-projection head. Optionally,
    images are changed at random before they are scored.

    Args:
        num_classes: number of classes.
        image_size: height and width of an image.
        image_channels: channels of an image.
        channels: of the first convolution; doubled with each halving of the resolution.
        augments: whether images are changed at random first (two_sided_augmentation.py).

    Reference: Miyato et al., spectral normalization (2018), table 3; Miyato and Koyama, projection
        discriminator (2018).
    """

    def __init__(
        self,
        *,
        num_classes: int,
        image_size: int,
        image_channels: int,
        channels: int = 32,
        augments: bool = True,
    ) -> None:
        super().__init__()
        self.augments = augments
        layers: list[nn.Module] = [nn.Conv2d(image_channels, channels, 3, padding=1)]
        size, width = image_size, channels
        while size % 2 == 0 and size > SMALLEST:
            layers += [nn.LeakyReLU(0.2), nn.Conv2d(width, 2 * width, 4, stride=2, padding=1)]
            size, width = size // 2, 2 * width
        layers += [nn.LeakyReLU(0.2), nn.Conv2d(width, width, 3, padding=1), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers)
        features = width * size**2
        self.score = nn.Linear(features, 1)
        self.embedding = nn.Embedding(num_classes, features)
        nn.init.normal_(self.embedding.weight, std=features**-0.5)
        normalize_spectrally(self, (nn.Conv2d, nn.Linear, nn.Embedding))

    def forward(self, images: Tensor, labels: Tensor, mixing: object = None) -> Tensor:
        """Returns scores [B] of `images` [B, C, H, W] with `labels` [B].

        The games pass `mixing` to discriminators with an architecture; it is not used here.
        """
        if self.augments:
            images = augmented_alike(images)
        h = self.layers(images).flatten(1)
        scores: Tensor = self.score(h).squeeze(1) + (self.embedding(labels) * h).sum(1)
        return scores
