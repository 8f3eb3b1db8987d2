"""Sharded parameters. Several processes with shards are tried in tests/integration."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist
from started_processes import finished
from torch import nn

from mlo.gradient_norm import total_norm
from mlo.sharding import gathered, is_sharded, sharded_like, whole, without_fsdp_hooks


@pytest.fixture(scope="module")
def mesh(tmp_path_factory):
    """One process, whose part of a sharded tensor is the whole."""
    from torch.distributed.device_mesh import init_device_mesh

    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture
def sharded(mesh):
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(torch.arange(6.0).view(3, 2), mesh, [Shard(0)])


def test_plain_tensors_pass_through():
    tensor = torch.arange(3.0)
    assert not is_sharded(tensor)
    assert not is_sharded(None)
    assert whole(tensor) is tensor
    assert gathered({"x": tensor})["x"] is tensor
    assert sharded_like(tensor, torch.zeros(3)) is tensor


def test_the_norm_is_over_all_tensors_together():
    norm = total_norm([torch.tensor([3.0]), torch.tensor([[4.0]])])
    assert float(norm) == pytest.approx(5.0)


def test_a_plain_import_does_not_load_dtensor():
    code = (
        "import sys, torch; name = 'torch.distributed.tensor'; before = name in sys.modules; "
        "import mlo.sharding as s; assert not s.is_sharded(torch.ones(1)); "
        "assert (name in sys.modules) == before"
    )
    done = finished([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr


def test_a_sharded_tensor_is_gathered_with_its_gradient(sharded):
    parameter = sharded.detach().requires_grad_()
    local = gathered({"x": parameter})["x"]
    assert not is_sharded(local)
    assert torch.equal(local, whole(parameter).detach())
    (gradient,) = torch.autograd.grad((local**2).sum(), parameter)
    assert is_sharded(gradient)
    assert torch.equal(whole(gradient), 2.0 * torch.arange(6.0).view(3, 2))


def test_a_whole_tensor_is_sharded_like_a_parameter(sharded):
    value = torch.ones(3, 2)
    found = sharded_like(value, sharded)
    assert is_sharded(found)
    assert found.placements == sharded.placements
    assert torch.equal(whole(found), value)


def test_the_norm_of_sharded_tensors_is_a_plain_tensor(sharded):
    norm = total_norm([sharded, sharded])
    assert not is_sharded(norm)
    assert float(norm) == pytest.approx(float(torch.arange(6.0).norm()) * 2**0.5)


def test_hooks_of_fully_shard_rest_and_come_back(mesh):
    from torch.distributed.fsdp import fully_shard

    module = fully_shard(nn.Linear(2, 2), mesh=mesh)
    own = module.register_forward_hook(lambda *_: None)
    before = dict(module._forward_pre_hooks), dict(module._forward_hooks)
    with without_fsdp_hooks([module, nn.Linear(1, 1)]):
        assert not module._forward_pre_hooks
        assert list(module._forward_hooks) == [own.id]
    assert (dict(module._forward_pre_hooks), dict(module._forward_hooks)) == before
