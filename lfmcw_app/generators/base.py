"""What all image generators share: images of given classes, normalised like the classifier's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lfmcw_app.errors import InputError
from mlo.distributed import rank_and_size, shard

__all__ = ["ImageGenerator", "base_and_doublings"]

LARGEST_BASE = 16


class ImageGenerator(nn.Module):
    """Draws images of given classes, in the classifier's normalised space.

    A subclass says how (`pixels`).

    Args:
        noise_dim: size of the noise vector.
        image_channels: channels of an image.
        mean: mean of each image channel, for pixels in [0, 1].
        std: standard deviation of each image channel.

    Attributes:
        evaluations_per_update: calls of `track` per update of the weights.
    """

    mean: Tensor
    std: Tensor
    evaluations_per_update: int = 1

    def __init__(
        self,
        *,
        noise_dim: int,
        image_channels: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
    ) -> None:
        super().__init__()
        self.noise_dim = noise_dim
        shape = (1, image_channels, 1, 1)
        self.register_buffer("mean", torch.tensor(mean).view(shape))
        self.register_buffer("std", torch.tensor(std).view(shape))

    def pixels(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Returns images in [-1, 1], [B, image_channels, H, W].

        `noise` is [B, noise_dim], `labels` are [B].
        """
        raise NotImplementedError

    def forward(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Returns images [B, image_channels, H, W] for `noise` [B, noise_dim] and `labels` [B]."""
        # From [-1, 1] to [0, 1], and then normalised like the data set's images.
        pixels = (self.pixels(noise, labels) + 1.0) / 2.0
        images: Tensor = (pixels - self.mean) / self.std
        return images

    def noise(self, labels: Tensor) -> Tensor:
        """Draws noise [B, noise_dim] for `labels` [B] from the global random state.

        If processes share a batch, each draws for all of it and takes its rows, so the noise does
        not depend on their number.
        """
        count = len(labels) * rank_and_size(of_loss=True)[1]
        whole = torch.randn(count, self.noise_dim, device=labels.device, dtype=self.mean.dtype)
        noise: Tensor = shard(whole)
        return noise

    def sample(self, labels: Tensor) -> Tensor:
        """Draws noise, and returns one image per label, differentiable in the weights."""
        images: Tensor = self(self.noise(labels), labels)
        return images

    @torch.no_grad()
    def show(self, labels: Tensor) -> Tensor:
        """Draws images for people to look at, [B, image_channels, H, W].

        They are the same as those of `sample` unless weights are averaged.
        """
        return self.sample(labels)

    def track(self) -> None:
        """Updates averages of the weights; the loss calls it in each evaluation."""


def base_and_doublings(image_size: int) -> tuple[int, int]:
    """Splits an image's size into a base and the number of times it is doubled.

    Args:
        image_size: height and width of an image, base · 2^doublings.

    Returns:
        (base, doublings), the base at most 7 where that can be: 32 = 4 · 2³, 28 = 7 · 2²,
        224 = 7 · 2⁵, 48 = 6 · 2³.

    Raises:
        InputError: for an odd size, or one whose base is above 16.
    """
    # At least one doubling, and then down to the first base of at most 7.
    base, doublings = image_size, 0
    while base % 2 == 0 and (base > 7 or doublings == 0):
        base, doublings = base // 2, doublings + 1
    if doublings == 0 or base > LARGEST_BASE:
        raise InputError(
            f"A generator doubles the resolution from a base of at most {LARGEST_BASE}, and "
            f"cannot reach images of {image_size}×{image_size}. Set data.image_size to such a "
            "base times a power of two: 16, 28, 32, 64, 96, 224."
        )
    return base, doublings
