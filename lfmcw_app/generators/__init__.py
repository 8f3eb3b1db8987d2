"""Class-conditional image generators and the discriminator that shares the searched architecture."""

from lfmcw_app.generators.dcgan import ConditionalDCGAN
from lfmcw_app.generators.discriminator import Discriminator

__all__ = ["ConditionalDCGAN", "Discriminator"]
