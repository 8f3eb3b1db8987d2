"""The discriminator: a cell network with the architecture A, and a class-projection head.

It has its own weights H.

Reference: Gala and Xie, LFM-CW, section 3 (the discriminator shares A); Miyato and Koyama,
    projection discriminator (2018).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from lfmcw_app.errors import InputError
from lfmcw_app.generators.blocks import normalize_spectrally
from lfmcw_app.search_space.supernet import MixingWeights, Supernet

__all__ = ["Discriminator", "SpectralNorm", "mixes_the_batch"]

SpectralNorm = Literal["none", "head", "all"]


class Discriminator(nn.Module):
    """Scores whether an image of a class is real: high for real, low for generated.

    Args:
        trunk: a supernet, of which only the features are used.
        num_classes: number of classes.
        feature_size: height and width of the trunk's features.
        head: "flatten" keeps the positions of features (small images); "sum" adds them up over the
            image (BigGAN).
        spectral_norm: which weights are divided by their largest singular value: "none"; "head",
            the score and the class embedding; "all", the trunk's convolutions as well (BigGAN),
            which needs a trunk without norms.

    Raises:
        InputError: for spectral norm if a norm of the trunk undoes it.
    """

    def __init__(
        self,
        trunk: Supernet,
        *,
        num_classes: int,
        feature_size: int,
        head: Literal["flatten", "sum"] = "flatten",
        spectral_norm: SpectralNorm = "none",
    ) -> None:
        super().__init__()
        _check_norms(trunk, spectral_norm)
        self.trunk = trunk
        self.trunk.classifier = nn.Identity()  # the trunk's features are used, not its logits
        self.head = head
        width = trunk.out_channels * (feature_size**2 if head == "flatten" else 1)
        self.score = nn.Linear(width, 1)
        self.embedding = nn.Embedding(num_classes, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        if spectral_norm != "none":
            normalize_spectrally(self.score)
            normalize_spectrally(self.embedding, (nn.Embedding,))
        if spectral_norm == "all":
            normalize_spectrally(self.trunk)

    def forward(self, images: Tensor, labels: Tensor, mixing: MixingWeights) -> Tensor:
        """Returns scores [B] of `images` [B, C, H, W] with `labels` [B], under `mixing`."""
        # The projection: the class embedding's product with the features is added to the score.
        features = F.relu(self.trunk.features(images, mixing))
        h = features.flatten(1) if self.head == "flatten" else features.sum(dim=(2, 3))
        scores: Tensor = self.score(h).squeeze(1) + (self.embedding(labels) * h).sum(1)
        return scores


def mixes_the_batch(module: nn.Module) -> bool:
    """Whether the module holds a BatchNorm, so that the images of a batch affect each other."""
    return any(isinstance(m, _BatchNorm) for m in module.modules())


def _check_norms(trunk: nn.Module, spectral_norm: SpectralNorm) -> None:
    if spectral_norm == "none":
        return
    if mixes_the_batch(trunk):
        raise InputError(
            "Spectral norm bounds how fast the score of an image changes, but the BatchNorm in "
            "the discriminator's trunk divides by the batch's deviation and removes the bound. "
            "Build the trunk with another norm, or without one, or set spectral_norm='none'."
        )
    has_norms = any(isinstance(m, (nn.GroupNorm, _InstanceNorm)) for m in trunk.modules())
    if spectral_norm == "all" and has_norms:
        raise InputError(
            "Spectral norm of the trunk's convolutions has no effect before a norm, which "
            "cancels the scale of its input, and the discriminator's trunk has norms. Build it "
            "without norms, or set spectral_norm='head'."
        )
