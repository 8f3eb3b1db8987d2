"""A class-conditional DCGAN generator: deconvolutions over a noise vector and a class embedding.

Reference: Radford et al., DCGAN (2016); Mirza and Osindero, conditional GAN (2014).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lfmcw_app.generators.base import ImageGenerator

__all__ = ["ConditionalDCGAN"]


class ConditionalDCGAN(ImageGenerator):
    """Draws images of given classes, in the classifier's normalised space.

    Args:
        num_classes: number of classes.
        image_size: height and width of an image, even.
        image_channels: channels of an image.
        mean: mean of each image channel, for pixels in [0, 1].
        std: standard deviation of each image channel.
        noise_dim: size of the noise vector.
        channels: channels before the last deconvolution; doubled with each halving of the
            resolution.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        image_size: int,
        image_channels: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        noise_dim: int = 64,
        channels: int = 32,
    ) -> None:
        super().__init__(noise_dim=noise_dim, image_channels=image_channels, mean=mean, std=std)

        # From the base size each deconvolution doubles the resolution and halves the channels.
        size, doublings = image_size, 0
        while size % 2 == 0 and size > 4:
            size, doublings = size // 2, doublings + 1
        width = channels * 2 ** (doublings - 1)
        self.embedding = nn.Embedding(num_classes, noise_dim)
        layers: list[nn.Module] = [
            nn.ConvTranspose2d(2 * noise_dim, width, size, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        for _ in range(doublings - 1):
            layers += [
                nn.ConvTranspose2d(width, width // 2, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(width // 2),
                nn.ReLU(),
            ]
            width //= 2
        layers += [nn.ConvTranspose2d(width, image_channels, 4, stride=2, padding=1), nn.Tanh()]
        self.layers = nn.Sequential(*layers)
        for module in self.layers:
            if isinstance(module, nn.ConvTranspose2d):
                nn.init.normal_(module.weight, std=0.02)

    def pixels(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Returns images in [-1, 1], [B, image_channels, H, W].

        `noise` is [B, noise_dim], `labels` are [B].
        """
        code = torch.cat([noise, self.embedding(labels)], dim=1)[:, :, None, None]
        images: Tensor = self.layers(code)
        return images
