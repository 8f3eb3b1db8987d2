"""Norms whose gains are the mixing weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lfmcw_app.search_space.norms import GainBatchNorm, GainGroupNorm, GainOnly
from mlo.distributed import SyncBatchNorm

NORMS = {"batch": lambda: GainBatchNorm(6), "group": lambda: GainGroupNorm(2, 6), "none": GainOnly}


@pytest.fixture
def maps():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(4, 6, 3, 3, generator=generator, dtype=torch.float64)


@pytest.fixture
def gain():
    return torch.linspace(-1.0, 2.0, 6, dtype=torch.float64)


@pytest.mark.parametrize("kind", NORMS)
def test_the_gain_multiplies_what_the_norm_gives(kind, maps, gain):
    norm = NORMS[kind]().double()
    expected = copy.deepcopy(norm)(maps) * gain.view(-1, 1, 1)
    torch.testing.assert_close(norm(maps, gain), expected)


@pytest.mark.parametrize("kind", NORMS)
def test_norms_have_no_parameters_of_their_own(kind):
    assert not list(NORMS[kind]().parameters())


@pytest.mark.parametrize("kind", NORMS)
def test_the_gain_is_differentiated_twice(kind, maps, gain):
    norm = NORMS[kind]().double()
    gain.requires_grad_()
    (first,) = torch.autograd.grad(norm(maps, gain).pow(3).sum(), gain, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), gain)
    normalised = copy.deepcopy(norm)(maps)
    expected = 6.0 * gain * normalised.pow(3).sum(dim=(0, 2, 3))
    torch.testing.assert_close(second, expected)


def test_a_gain_that_is_not_contiguous_serves(maps):
    norm = GainBatchNorm(6).double()
    gain = torch.arange(12.0, dtype=torch.float64)[::2].requires_grad_()
    (found,) = torch.autograd.grad(norm(maps, gain).square().sum(), gain)
    expected = (
        2.0
        * gain.detach()
        * nn.BatchNorm2d(6, affine=False).double()(maps).square().sum(dim=(0, 2, 3))
    )
    torch.testing.assert_close(found, expected)


def test_running_statistics_are_pytorchs(maps, gain):
    ours, plain = GainBatchNorm(6).double(), nn.BatchNorm2d(6, affine=False).double()
    ours(maps, gain), plain(maps)
    assert ours.state_dict().keys() == plain.state_dict().keys()
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value)
    torch.testing.assert_close(ours.eval()(maps), plain.eval()(maps))


def test_it_has_a_synchronised_counterpart(maps, gain):
    plain = GainBatchNorm(6).double()
    converted = SyncBatchNorm.convert(copy.deepcopy(plain))
    assert isinstance(converted, SyncBatchNorm)
    torch.testing.assert_close(converted(maps, gain), plain(maps, gain))


def test_without_running_statistics_a_norm_goes_by_its_batch(maps, gain):
    norm = GainBatchNorm(6, running_statistics=False).double()
    assert not norm.state_dict()
    expected = GainBatchNorm(6).double()(maps, gain)
    assert torch.equal(norm(maps, gain), expected)
    assert torch.equal(norm.eval()(maps, gain), expected)
