"""Data parallelism in one process. Several processes are tried in tests/integration."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import mlo
from mlo.distributed import SyncBatchNorm, global_mean, shard
from mlo.testing import bilevel_quadratic


def part(rank, size):
    """What `shard` needs to know of a process."""
    return SimpleNamespace(rank=rank, size=size)


@pytest.mark.parametrize("options", [{"sync": "always"}, {"noise": "none"}])
def test_an_unknown_mode_is_refused(options):
    with pytest.raises(mlo.ConfigurationError, match="must be one of"):
        mlo.DataParallel(**options)


@pytest.mark.parametrize("choice", ["exactly", 3])
def test_an_unknown_choice_is_refused(choice):
    closed = bilevel_quadratic()
    with pytest.raises(mlo.ConfigurationError, match="distributed="):
        mlo.MultilevelOptimizer(closed.problems, "direct", distributed=choice)


def test_processes_without_a_group_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    closed = bilevel_quadratic()
    with pytest.raises(mlo.ConfigurationError, match="init_process_group"):
        mlo.MultilevelOptimizer(closed.problems, "direct", distributed="exact")


@pytest.mark.parametrize("choice", ["exact", "final", "off", None])
def test_one_process_shares_nothing(choice, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    closed = bilevel_quadratic()
    optimizer = mlo.MultilevelOptimizer(closed.problems, "direct", distributed=choice)
    assert optimizer.parallel is None


def test_the_shards_of_all_processes_are_the_batch():
    batch = {"images": torch.arange(12.0).view(6, 2), "pair": (torch.arange(6), "name"), "k": 3}
    shards = [shard(batch, part(rank, 3)) for rank in range(3)]
    assert torch.equal(torch.cat([own["images"] for own in shards]), batch["images"])
    assert torch.equal(torch.cat([own["pair"][0] for own in shards]), batch["pair"][0])
    assert all(own["pair"][1] == "name" and own["k"] == 3 for own in shards)


@pytest.mark.parametrize("tensor", [torch.ones(5), torch.tensor(1.0)], ids=["rows", "scalar"])
def test_rows_that_cannot_be_divided_are_refused(tensor):
    with pytest.raises(mlo.ConfigurationError, match="cannot be divided equally among 2"):
        shard([tensor], part(0, 2))


def test_outside_of_a_loss_nothing_is_shared():
    batch, tensor = [torch.arange(5)], torch.ones(2, requires_grad=True)
    assert shard(batch) is batch
    assert global_mean(tensor) is tensor


@pytest.mark.parametrize("training", [True, False])
def test_synchronised_batchnorm_alone_is_the_plain_one(training):
    """A single process has nothing to synchronise."""
    plain = nn.BatchNorm1d(3).double().train(training)
    ours = SyncBatchNorm(3).double().train(training)
    x = torch.randn(5, 3, dtype=torch.float64)
    assert torch.equal(ours(x), plain(x))
    assert torch.equal(ours.running_var, plain.running_var)


def test_every_batchnorm_is_converted_with_its_parameters():
    inner = nn.Sequential(nn.BatchNorm1d(3, momentum=0.3))
    module = nn.Sequential(nn.Linear(2, 3), inner, nn.ReLU())
    weight = inner[0].weight
    assert SyncBatchNorm.convert(module) is module
    converted = module[1][0]
    assert type(converted) is SyncBatchNorm
    assert converted.weight is weight
    assert converted.momentum == 0.3
    assert SyncBatchNorm.convert(module)[1][0] is converted


class Own(nn.BatchNorm1d):
    """A BatchNorm with a forward pass of its own."""

    def forward(self, x):
        return 2.0 * super().forward(x)


def test_a_batchnorm_of_ones_own_must_name_its_counterpart(monkeypatch):
    with pytest.raises(mlo.ConfigurationError, match=r"Own is a BatchNorm.*`synchronized`"):
        SyncBatchNorm.convert(nn.Sequential(Own(3)))
    monkeypatch.setattr(Own, "synchronized", SyncBatchNorm, raising=False)
    assert type(SyncBatchNorm.convert(Own(3))) is SyncBatchNorm


def test_an_input_without_channels_is_refused():
    with pytest.raises(ValueError, match="at least 2 dimensions"):
        SyncBatchNorm(3)(torch.ones(3))
