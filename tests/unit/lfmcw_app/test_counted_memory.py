"""Storages on the meta device, counted: against sizes worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lfmcw_app.counted_memory import BLOCK, MemoryCount

KB = 1024


def blocks(*sizes):
    """Bytes of storages, each rounded up to whole blocks."""
    return sum(-(-size // BLOCK) * BLOCK for size in sizes)


@pytest.fixture
def count():
    with MemoryCount() as counted:
        yield counted


def test_a_tensor_counts_for_as_long_as_it_lives(count):
    x = torch.empty(KB, device="meta")
    assert count.held == count.peak == 4 * KB
    y = x + 1
    assert count.held == count.peak == 8 * KB
    del x
    assert (count.held, count.peak) == (4 * KB, 8 * KB)
    count.restart()
    assert count.peak == 4 * KB
    del y
    assert (count.held, count.peak) == (0, 4 * KB)


def test_storages_take_whole_blocks(count):
    tensors = [torch.empty(size, dtype=torch.uint8, device="meta") for size in (1, 512, 513)]
    assert count.held == blocks(1, 512, 513) == 512 + 512 + 1024
    del tensors


def test_views_and_work_in_place_take_nothing(count):
    x = torch.empty(8, KB, device="meta")
    held = count.held
    views = [x[2:], x.T, x.view(-1), x.expand(3, 8, KB), x.detach()]
    x.add_(1.0)
    views[1].mul_(2.0)
    assert (count.held, count.peak) == (held, held)
    del x
    assert count.held == held  # the views have it still
    del views
    assert count.held == 0


def test_what_is_on_the_cpu_takes_nothing(count):
    torch.zeros(KB).to("meta")
    assert (count.held, count.peak) == (0, 4 * KB)


def test_a_step_of_a_network_is_what_it_is_by_hand(count):
    """Two linear layers with a ReLU between, a batch of 256, and SGD with momentum.

    The second step's peak is in the derivative of ReLU. There are then the weights and their
    momenta, the images, the loss and its gradient (a block each), the gradient of the second
    layer's weights, the map after ReLU, and the gradients of the map after it and before it.
    """
    layers = nn.Linear(64, 128, bias=False), nn.ReLU(), nn.Linear(128, 32, bias=False)
    net = nn.Sequential(*layers).to("meta")
    sgd = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, foreach=False)
    images = torch.empty(256, 64, device="meta")

    def step():
        sgd.zero_grad()
        net(images).sum().backward()
        sgd.step()

    step()
    first, second, map_, batch = 4 * 64 * 128, 4 * 128 * 32, 4 * 256 * 128, 4 * 256 * 64
    held = 3 * (first + second) + batch  # weights, momenta and gradients
    assert count.held == held
    count.restart()
    step()
    assert count.peak == 2 * (first + second) + batch + 2 * BLOCK + second + 3 * map_
    assert count.held == held


def test_numbers_that_are_read_are_one(count):
    x = torch.empty(3, device="meta")
    assert x.sum().item() == 1.0
    assert (x > 0).all().item() is True
    assert x.tolist() == [1.0, 1.0, 1.0]
    assert float(x.norm()) == 1.0
    assert torch.equal(x.cpu(), torch.ones(3))
    assert x.to(torch.float64).device.type == "meta"


def test_without_it_numbers_cannot_be_read():
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.empty(3, device="meta").tolist()
