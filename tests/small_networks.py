"""Small derived networks, and those of the published sizes."""

from __future__ import annotations

import torch

from lfmcw_app.search_space.genotype import random_genotype
from lfmcw_app.search_space.named import NAMED_GENOTYPES
from lfmcw_app.search_space.network import DerivedNetwork


def network(stem="cifar", *, genotype=None, layers=3, channels=4, auxiliary=True, num_classes=5):
    torch.manual_seed(0)
    return DerivedNetwork(
        genotype or random_genotype(2, 0),
        in_channels=3,
        num_classes=num_classes,
        channels=channels,
        layers=layers,
        auxiliary=auxiliary,
        stem=stem,
    )


def cifar_and_imagenet(name):
    genotype = NAMED_GENOTYPES[name]
    with torch.device("meta"):
        return (
            network(genotype=genotype, layers=20, channels=36, num_classes=10),
            network("imagenet", genotype=genotype, layers=14, channels=48, num_classes=1000),
        )
