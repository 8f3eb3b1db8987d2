"""The derived network for CIFAR and ImageNet."""

from __future__ import annotations

import pytest
import torch
from small_networks import network
from torch import nn

from lfmcw_app.errors import InputError
from lfmcw_app.search_space.genotype import Edge, Genotype, random_genotype
from lfmcw_app.search_space.network import DerivedCell, DerivedNetwork, drop_path


def shapes_of_cells(net, size):
    shapes = []
    hooks = [
        cell.register_forward_hook(lambda m, args, out: shapes.append(tuple(out.shape)))
        for cell in net.cells
    ]
    net(torch.randn(2, 3, size, size))
    for hook in hooks:
        hook.remove()
    return shapes


def test_cells_of_the_imagenet_network_see_small_maps():
    """The first cell has an eighth of the resolution, and the last one a 32nd."""
    net = network("imagenet")
    assert shapes_of_cells(net, 64) == [(2, 8, 8, 8), (2, 16, 4, 4), (2, 32, 2, 2)]
    assert shapes_of_cells(network("cifar"), 32) == [(2, 8, 32, 32), (2, 16, 16, 16), (2, 32, 8, 8)]


@pytest.mark.parametrize(("stem", "size", "map_size"), [("cifar", 32, 8), ("imagenet", 224, 7)])
def test_the_auxiliary_head_reads_windows_of_five(stem, size, map_size):
    head = network(stem).auxiliary
    maps = torch.randn(1, 32, map_size, map_size)
    stride = 3 if stem == "cifar" else 2
    assert torch.equal(head[1](maps), nn.functional.avg_pool2d(maps, 5, stride=stride))
    assert head[1](torch.randn(1, 32, 4, 4)).shape == (1, 32, 2, 2)
    norms = sum(isinstance(layer, nn.BatchNorm2d) for layer in head)
    assert norms == (2 if stem == "cifar" else 1)  # the published ImageNet head lacks the second


@pytest.mark.parametrize("stem", ["cifar", "imagenet"])
def test_the_auxiliary_head_gives_logits_in_training_only(stem):
    """Both heads give logits in training, and one does in evaluation."""
    net = network(stem)
    logits, auxiliary = net(torch.randn(2, 3, 64, 64))
    assert logits.shape == auxiliary.shape == (2, 5)
    assert net.eval()(torch.randn(2, 3, 64, 64))[1] is None


@pytest.mark.parametrize(("stem", "size", "divisor"), [("cifar", 30, 4), ("imagenet", 48, 32)])
def test_images_of_a_size_that_cannot_be_halved_are_refused(stem, size, divisor):
    with pytest.raises(InputError, match=f"divisible by {divisor}"):
        network(stem)(torch.randn(2, 3, size, size))


def test_drop_path_drops_operations_but_no_identities():
    edges = (Edge("skip_connect", 0), Edge("max_pool_3x3", 1))
    cell = DerivedCell(edges, (4, 4), 4, reduces=False, reduced_before=False)
    torch.manual_seed(0)
    first, second = torch.randn(64, 4, 8, 8), torch.randn(64, 4, 8, 8)
    skipped = cell.preprocess0(first)
    pooled = nn.functional.max_pool2d(cell.preprocess1(second), 3, stride=1, padding=1)
    out = cell(first, second, 0.5)
    kept = (out - skipped).flatten(1).abs().amax(1) > 1e-5
    assert 16 < int(kept.sum()) < 48
    expected = skipped + 2.0 * pooled * kept[:, None, None, None]
    assert torch.allclose(out, expected, atol=1e-5)
    assert torch.allclose(cell.eval()(first, second, 0.5), cell(first, second, 0.0))


# The cells that DARTS found on CIFAR-10 (second order), as published in its appendix.
DARTS_V2 = Genotype(
    normal=tuple(
        Edge(*edge)
        for edge in [
            ("sep_conv_3x3", 0), ("sep_conv_3x3", 1), ("sep_conv_3x3", 0), ("sep_conv_3x3", 1),
            ("sep_conv_3x3", 1), ("skip_connect", 0), ("skip_connect", 0), ("dil_conv_3x3", 2),
        ]
    ),
    reduction=tuple(
        Edge(*edge)
        for edge in [
            ("max_pool_3x3", 0), ("max_pool_3x3", 1), ("skip_connect", 2), ("max_pool_3x3", 1),
            ("max_pool_3x3", 0), ("skip_connect", 2), ("skip_connect", 2), ("max_pool_3x3", 1),
        ]
    ),
)  # fmt: skip


def test_the_darts_network_has_the_published_parameters():
    """The published DARTS cell has the published number of parameters."""
    network = DerivedNetwork(
        DARTS_V2, in_channels=3, num_classes=10, channels=36, layers=20, auxiliary=True
    )
    assert round(network.parameter_count() / 1e6, 1) == 3.3


def test_the_auxiliary_head_speaks_in_training_only():
    network = DerivedNetwork(
        random_genotype(2, 0), in_channels=3, num_classes=10, channels=4, layers=3, auxiliary=True
    )
    images = torch.randn(2, 3, 32, 32)
    logits, auxiliary = network(images)
    assert logits.shape == auxiliary.shape == (2, 10)
    assert network.eval()(images)[1] is None


def test_drop_path_drops_whole_examples_and_keeps_the_mean():
    torch.manual_seed(0)
    out = drop_path(torch.ones(2000, 2, 3, 3), 0.3)
    per_example = out.flatten(1)
    assert bool(((per_example == 0).all(1) | (per_example == per_example[:, :1]).all(1)).all())
    assert float(out.mean()) == pytest.approx(1.0, abs=0.05)
    assert float((per_example[:, 0] == 0).float().mean()) == pytest.approx(0.3, abs=0.04)
