"""The class-conditional generator of WGAN-GP: residual up-sampling blocks.

They have class-conditional BatchNorm. It is correct here but would be wrong in the critic, whose
penalty is a condition on the score of each single image.

Reference: Gulrajani et al., Improved Training of Wasserstein GANs (2017), appendix F and its
conditional CIFAR-10 program.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from lfmcw_app.generators.base import ImageGenerator, base_and_doublings
from lfmcw_app.generators.blocks import UpBlock

__all__ = ["ConditionalWGANGP"]


class ConditionalWGANGP(ImageGenerator):
    """Draws images of given classes, in the classifier's normalised space.

    Args:
        num_classes: number of classes.
        image_size: height and width of an image: a base of at most 16 times a power of two.
        image_channels: channels of an image.
        mean: mean of each image channel, for pixels in [0, 1].
        std: standard deviation of each image channel.
        noise_dim: size of the noise vector.
        channels: channels of every block.

    Raises:
        InputError: for an image size that no block doubling leads to.
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
        channels: int = 128,
    ) -> None:
        super().__init__(noise_dim=noise_dim, image_channels=image_channels, mean=mean, std=std)
        self.base, doublings = base_and_doublings(image_size)
        self.linear = nn.Linear(noise_dim, channels * self.base**2)
        self.blocks = nn.ModuleList(
            UpBlock(channels, channels, num_classes=num_classes) for _ in range(doublings)
        )
        self.norm = nn.BatchNorm2d(channels)
        self.to_image = nn.Conv2d(channels, image_channels, 3, padding=1)

        # As the authors' program begins: He's initialisation for the 3×3 convolutions.
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
            elif isinstance(module, nn.Embedding):
                # Not 0: the classes differ from the first step on.
                nn.init.normal_(module.weight, std=0.02)

    def pixels(self, noise: Tensor, labels: Tensor) -> Tensor:
        """Returns images in [-1, 1], [B, image_channels, H, W].

        `noise` is [B, noise_dim], `labels` are [B].
        """
        h = self.linear(noise).view(len(noise), -1, self.base, self.base)
        for block in self.blocks:
            h = block(h, labels)
        images: Tensor = self.to_image(F.relu(self.norm(h))).tanh()
        return images
