"""What comes before the cells."""

from __future__ import annotations

import pytest
import torch
from small_networks import network
from torch import nn

from lfmcw_app.search_space.supernet import Architecture, Supernet


def test_the_imagenet_stem_is_the_published_one():
    net = network("imagenet", channels=6)
    layers = [layer for stem in (net.stem, net.second_stem) for layer in stem]
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size, c.stride) for c in convolutions] == [
        (3, 3, (3, 3), (2, 2)), (3, 6, (3, 3), (2, 2)), (6, 6, (3, 3), (2, 2)),
    ]  # fmt: skip
    kinds = [type(layer).__name__ for layer in layers]
    assert kinds == [
        "Conv2d",
        "BatchNorm2d",
        "ReLU",
        "Conv2d",
        "BatchNorm2d",
        "ReLU",
        "Conv2d",
        "BatchNorm2d",
    ]
    # The first cell reads 1/4 and 1/8 of the resolution: its first input is halved, as after a
    # reduction.
    assert type(net.cells[0].preprocess0).__name__ == "FactorizedReduce"


def test_the_imagenet_stem_feeds_two_resolutions():
    """The ImageNet stem reduces to an eighth, and feeds the first cell two resolutions."""
    supernet = Supernet(
        in_channels=3,
        num_classes=5,
        channels=4,
        layers=3,
        nodes=1,
        stem="imagenet",
        partial_channels=2,
    )
    images = torch.randn(2, 3, 64, 64)
    first = supernet.stem(images)
    assert first.shape == (2, 12, 16, 16)
    assert supernet.second_stem(first).shape == (2, 12, 8, 8)
    weights = Architecture(1, edge_weights=True)()
    assert supernet.features(images, weights).shape == (2, supernet.out_channels, 2, 2)
    with pytest.raises(ValueError, match="'cifar' or 'imagenet', got 'mnist'"):
        Supernet(in_channels=3, num_classes=5, stem="mnist")
