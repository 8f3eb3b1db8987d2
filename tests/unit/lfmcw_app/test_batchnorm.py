"""Running statistics that are computed anew."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from lfmcw_app.batchnorm import give_statistics, recompute_statistics, without_statistics
from lfmcw_app.search_space.genotype import random_genotype
from lfmcw_app.search_space.network import DerivedNetwork
from mlo.distributed import SyncBatchNorm


def small_network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
    )


def images(count=12, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return 5.0 + 3.0 * torch.randn(count, 2, 6, 6, generator=generator)


def test_one_batch_gives_its_own_statistics():
    """Of the first layer the mean and variance of its input; of all what training mode gives."""
    network, x = small_network(), images()
    recompute_statistics(network, [partial(network, x)])
    seen = network[0](x)
    assert torch.allclose(network[1].running_mean, seen.mean((0, 2, 3)), atol=1e-6)
    assert torch.allclose(
        network[1].running_var, seen.var((0, 2, 3), correction=0), rtol=1e-5, atol=0
    )
    tested = network.eval()(x)
    assert torch.allclose(tested, network.train()(x), atol=1e-5)


def test_batches_of_any_size_count_by_their_pixels():
    """The first layer's statistics are those of all images together, however they are cut."""
    x = images(13)
    whole, cut = small_network(), small_network()
    recompute_statistics(whole, [partial(whole, x)])
    recompute_statistics(cut, [partial(cut, part) for part in torch.split(x, 5)])
    assert torch.allclose(whole[1].running_mean, cut[1].running_mean, atol=1e-6)
    assert torch.allclose(whole[1].running_var, cut[1].running_var, rtol=1e-5, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_else_of_the_network_changes(training):
    network = small_network().train(training)
    before, state = copy.deepcopy(network.state_dict()), torch.get_rng_state()
    recompute_statistics(network, [partial(network, images())])
    after = network.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {f"{layer}.running_{what}" for layer in (1, 4) for what in ("mean", "var")}
    assert torch.equal(torch.get_rng_state(), state)
    assert network.training is training
    assert not network[1]._forward_pre_hooks


def test_a_single_image_and_equal_pixels_are_enough():
    network = small_network()
    recompute_statistics(
        network, [partial(network, torch.full((1, 2, 3, 3), 7.0))]
    )  # maps of one pixel
    assert network[1].running_var.tolist() == [0.0, 0.0, 0.0]
    assert bool(torch.isfinite(network.eval()(torch.full((1, 2, 3, 3), 7.0))).all())


def test_layers_that_no_image_reaches_keep_their_statistics():
    """The auxiliary head runs in training only."""
    torch.manual_seed(0)
    network = DerivedNetwork(
        random_genotype(2, 0), in_channels=1, num_classes=3, channels=4, layers=3, auxiliary=True
    )
    head = copy.deepcopy(network.auxiliary.state_dict())
    recompute_statistics(network, [partial(network, torch.randn(4, 1, 8, 8))])
    after = network.auxiliary.state_dict()
    assert all(torch.equal(head[name], value) for name, value in after.items())


def test_synchronised_layers_take_no_part_of_other_processes():
    network, plain = small_network(), small_network()
    SyncBatchNorm.convert(network)
    recompute_statistics(network, [partial(network, images())])
    recompute_statistics(plain, [partial(plain, images())])
    assert torch.equal(network[1].running_mean, plain[1].running_mean)


def test_few_steps_no_longer_leave_initial_statistics():
    """After one step the running mean is a tenth of the mean; computed anew, it is the mean."""
    network, x = small_network(), images()
    network.train()(x)
    seen = network[0](x).mean((0, 2, 3))
    assert torch.allclose(network[1].running_mean, 0.1 * seen, atol=1e-6)
    recompute_statistics(network, [partial(network, x)])
    assert torch.allclose(network[1].running_mean, seen, atol=1e-6)


def without(network):
    """The network with BatchNorms that keep no running statistics."""
    for name, layer in list(network.named_children()):
        if isinstance(layer, nn.BatchNorm2d):
            setattr(network, name, nn.BatchNorm2d(layer.num_features, track_running_stats=False))
    return network


def test_layers_that_kept_no_statistics_are_given_them():
    network, plain, x = without(small_network()).double(), small_network().double(), images()
    give_statistics(network)
    for one in (network, plain):
        recompute_statistics(one, [partial(one, x.double())])
    assert network.state_dict().keys() == plain.state_dict().keys()
    assert network[1].running_var.dtype == torch.float64
    alone = network.eval()(x[:1].double())
    assert torch.equal(alone, plain.eval()(x[:1].double()))
    assert torch.allclose(alone, network(x.double())[:1])


def test_only_statistics_that_a_module_lacks_are_left_out():
    saved = small_network().state_dict()
    assert without_statistics(saved, small_network().state_dict()) == (saved, 0)
    own = without(small_network()).state_dict()
    kept, dropped = without_statistics({**saved, "other": 1}, own)
    assert (set(kept), dropped) == ({*own, "other"}, 6)
