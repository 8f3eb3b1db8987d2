"""A class-conditional BigGAN generator: residual blocks, self-attention, spectral norm.

Reference: Brock et al., Large Scale GAN Training for High Fidelity Natural Image Synthesis (2019),
appendices B and C.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lfmcw_app.errors import InputError
from lfmcw_app.generators.average import MovingAverage
from lfmcw_app.generators.base import ImageGenerator, base_and_doublings
from lfmcw_app.generators.blocks import (
    Initialization,
    SelfAttention,
    UpBlock,
    initialize,
    normalize_spectrally,
)

__all__ = ["ConditionalBigGAN"]

_WIDTHS: dict[int, tuple[int, ...]] = {
    1: (4, 4),
    2: (4, 4, 4),
    3: (4, 4, 4, 4),
    4: (16, 16, 8, 4, 2),
    5: (16, 16, 8, 4, 2, 1),
    6: (16, 16, 8, 8, 4, 2, 1),
    7: (16, 16, 8, 8, 4, 2, 1, 1),
}
"""Doublings → widths in units of `channels`: at the base, then after each doubling.

From tables 4-6 of the paper and, for 32×32 and 64×64, from the authors' programs.
"""


class ConditionalBigGAN(ImageGenerator):
    """Draws images of given classes, in the classifier's normalised space.

    The defaults are those of 32×32 images: each norm has its own class embeddings, all the noise
    enters at the bottom, no attention. ImageNet's are `shared_dim=128, hierarchical=True,
    attention=64` (at 128×128), `initialization="orthogonal"`.

    Args:
        num_classes: number of classes.
        image_size: height and width of an image: a base of at most 16 times a power of two, at most
            2⁷.
        image_channels: channels of an image.
        mean: mean of each image channel, for pixels in [0, 1].
        std: standard deviation of each image channel.
        noise_dim: size of the noise vector.
        channels: unit of the widths of the blocks.
        shared_dim: size of one class embedding from which all norms take their scale and shift; 0:
            each has its own.
        hierarchical: gives a chunk of the noise to each block, with the shared embedding.
        attention: the resolution after whose block there is self-attention; None: no attention.
        initialization: "normal", N(0, 0.02²), or "orthogonal".
        average_decay: of the moving average of the weights, which `show` draws with.
        average_start: number of updates before averaging begins.

    Raises:
        InputError: for settings that do not fit together.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        image_size: int,
        image_channels: int,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        noise_dim: int = 128,
        channels: int = 64,
        shared_dim: int = 0,
        hierarchical: bool = False,
        attention: int | None = None,
        initialization: Initialization = "normal",
        average_decay: float = 0.9999,
        average_start: int = 1000,
    ) -> None:
        super().__init__(noise_dim=noise_dim, image_channels=image_channels, mean=mean, std=std)
        self.base, doublings = base_and_doublings(image_size)
        _check(image_size, self.base, doublings, noise_dim, shared_dim, hierarchical, attention)
        widths = [channels * unit for unit in _WIDTHS[doublings]]

        # A norm reads the label, or the shared embedding with, if hierarchical, a chunk of noise.
        self.hierarchical = hierarchical
        self.chunk = noise_dim // (doublings + 1) if hierarchical else noise_dim
        code_dim = shared_dim + (self.chunk if hierarchical else 0) if shared_dim else None
        self.embedding = nn.Embedding(num_classes, shared_dim) if shared_dim else None

        self.linear = nn.Linear(self.chunk, widths[0] * self.base**2)
        self.blocks = nn.ModuleList()
        self.attention: nn.Module = nn.Identity()
        self.attention_after: int | None = None
        for doubling, (width_in, width_out) in enumerate(pairwise(widths), start=1):
            self.blocks.append(
                UpBlock(width_in, width_out, num_classes=num_classes, code_dim=code_dim)
            )
            if self.base * 2**doubling == attention:
                self.attention, self.attention_after = SelfAttention(width_out), doubling - 1
        self.norm = nn.BatchNorm2d(widths[-1])
        self.to_image = nn.Conv2d(widths[-1], image_channels, 3, padding=1)

        # The order matters: spectral norm starts at the singular vectors of the initial weights,
        # and the average at everything before it.
        initialize(self, initialization)
        normalize_spectrally(self)
        self.average = MovingAverage(self._averaged(), decay=average_decay, start=average_start)

    def pixels(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Returns images in [-1, 1], [B, image_channels, H, W].

        `noise` is [B, noise_dim], `labels` are [B].
        """
        # Hierarchical noise: the first chunk enters at the bottom, the others one per block.
        chunks = noise.view(len(noise), -1, self.chunk).unbind(1)
        code = labels if self.embedding is None else self.embedding(labels)
        h = self.linear(chunks[0]).view(len(noise), -1, self.base, self.base)
        for index, block in enumerate(self.blocks):
            condition = code
            if self.hierarchical:
                condition = torch.cat([code, chunks[index + 1]], dim=1)
            h = block(h, condition)
            if index == self.attention_after:
                h = self.attention(h)
        images: Tensor = self.to_image(F.relu(self.norm(h))).tanh()
        return images

    def track(self) -> None:
        """Moves the average towards the weights that the module holds.

        In a round these are the ones before its update.
        """
        self.average.update(self._averaged(), self.evaluations_per_update)

    @torch.no_grad()
    def show(self, labels: Tensor) -> Tensor:
        """Draws images [B, image_channels, H, W] with the averaged weights; changes no buffer.

        The singular vectors of spectral norm are not averaged: the module's own are used. An error
        in them enters the norm squared.
        """
        # Copies, since norms and power iterations write to buffers in training mode.
        buffers = {
            name: buffer.clone()
            for name, buffer in self.named_buffers()
            if not name.startswith("average.")
        }
        arguments = (self.noise(labels), labels)
        images: Tensor = functional_call(self, buffers | self._copies_of_average(), arguments)
        return images

    def _copies_of_average(self) -> dict[str, Tensor]:
        return {name: tensor.clone() for name, tensor in self.average.tensors().items()}

    def _averaged(self) -> dict[str, Tensor]:
        """The weights, and the statistics of the norms that belong to them."""
        statistics = {
            name: buffer
            for name, buffer in self.named_buffers()
            if name.endswith(("running_mean", "running_var")) and not name.startswith("average.")
        }
        return dict(self.named_parameters()) | statistics


def _check(
    image_size: int,
    base: int,
    doublings: int,
    noise_dim: int,
    shared_dim: int,
    hierarchical: bool,
    attention: int | None,
) -> None:
    if doublings not in _WIDTHS:
        raise InputError(
            f"BigGAN doubles the resolution at most {max(_WIDTHS)} times; images of "
            f"{image_size}×{image_size} would need {doublings}. Set data.image_size to 256 or "
            "less."
        )
    if hierarchical and not shared_dim:
        raise InputError(
            "BigGAN's hierarchical noise enters the norms together with the shared class "
            "embedding, but shared_dim is 0. Set shared_dim (the paper: 128), or "
            "hierarchical=False."
        )
    if hierarchical and noise_dim % (doublings + 1):
        raise InputError(
            f"BigGAN's hierarchical noise has {doublings + 1} equal chunks for images of "
            f"{image_size}×{image_size}, and noise_dim={noise_dim} cannot be split into so many. "
            f"Set it to a multiple of {doublings + 1}."
        )
    resolutions = [base * 2**doubling for doubling in range(1, doublings + 1)]
    if attention is not None and attention not in resolutions:
        raise InputError(
            f"BigGAN has no block at the resolution attention={attention}; for images of "
            f"{image_size}×{image_size} there are {', '.join(map(str, resolutions))}. Choose one "
            "of them, or None."
        )
