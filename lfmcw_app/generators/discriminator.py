"""The discriminator: a cell network with the architecture A, its own weights H, and a class-projection head.

Reference: Gala and Xie, LFM-CW, section 3 (the discriminator shares A); Miyato and Koyama, projection discriminator (2018).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from lfmcw_app.search_space.supernet import MixingWeights, Supernet

__all__ = ["Discriminator"]


class Discriminator(nn.Module):
    """Scores whether an image of a class is real: high for real, low for generated.

    Args:
        trunk: a supernet, of which only the features are used.
        num_classes: number of classes.
        feature_size: height and width of the trunk's features.
        head: "flatten" keeps where features are (small images); "sum" adds them up over the image.
    """

    def __init__(
        self, trunk: Supernet, *, num_classes: int, feature_size: int, head: Literal["flatten", "sum"] = "flatten"
    ) -> None:
        super().__init__()
        self.trunk = trunk
        self.trunk.classifier = nn.Identity()  # the trunk's features are used, not its logits
        self.head = head
        width = trunk.out_channels * (feature_size**2 if head == "flatten" else 1)
        self.score = nn.Linear(width, 1)
        self.embedding = nn.Embedding(num_classes, width)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)

    def forward(self, images: Tensor, labels: Tensor, mixing: MixingWeights) -> Tensor:
        """Returns scores [B] of `images` [B, C, H, W] with `labels` [B], under the architecture `mixing`."""
        features = F.relu(self.trunk.features(images, mixing))
        h = features.flatten(1) if self.head == "flatten" else features.sum(dim=(2, 3))
        scores: Tensor = self.score(h).squeeze(1) + (self.embedding(labels) * h).sum(1)
        return scores
