"""The pretended GPU itself: what would fail on a real one fails, and what would wait is seen."""

from __future__ import annotations

import copy

import pytest
import torch
from pretended_gpu.observer import Mismatch, Waited
from torch.nn import functional as F

from mlo.randomness import RandomState


def on_gpu(*shape):
    return torch.ones(*shape, device="cuda")


def test_tensors_say_where_they_are():
    tensor = on_gpu(3)
    assert tensor.device == torch.device("cuda", 0)
    assert tensor.is_cuda and not tensor.is_cpu and tensor.get_device() == 0
    for view in (tensor[1:], tensor.detach(), tensor + 1, torch.zeros_like(tensor), -tensor):
        assert view.is_cuda
    assert not tensor.cpu().is_cuda
    assert copy.deepcopy(torch.nn.Linear(2, 2).to("cuda")).weight.is_cuda


def test_numbers_are_those_of_the_cpu():
    torch.manual_seed(0)
    x = torch.randn(4, 3, requires_grad=True)
    moved = x.detach().to("cuda").requires_grad_()
    for tensor in (x, moved):
        (tensor.softmax(1) ** 2).sum().backward()
    assert moved.grad.is_cuda and torch.equal(moved.grad.cpu(), x.grad)


@pytest.mark.parametrize(
    "mixed",
    [
        lambda: on_gpu(3) + torch.ones(3),
        lambda: on_gpu(2, 2) @ torch.ones(2, 2),
        lambda: torch.cat([on_gpu(1), torch.ones(1)]),
        lambda: F.cross_entropy(on_gpu(2, 3), torch.tensor([0, 1])),
        lambda: torch.ones(3)[torch.zeros(1, dtype=torch.long, device="cuda")],
        lambda: F.batch_norm(on_gpu(2, 3), torch.zeros(3), torch.ones(3), training=True),
    ],
    ids=["sum", "product", "concatenation", "loss", "index", "statistics"],
)
def test_operands_on_two_devices_are_refused(mixed):
    with pytest.raises(Mismatch, match="cuda:0 and cpu"):
        mixed()


def test_a_mismatch_in_a_backward_pass_is_refused():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return g * torch.ones(3)

    with pytest.raises(Mismatch):
        Wrong.apply(on_gpu(3).requires_grad_()).sum().backward()


def test_a_number_of_the_cpu_is_taken():
    assert (on_gpu(3) * torch.tensor(2.0)).is_cuda


@pytest.mark.parametrize(
    "waits",
    [
        lambda x: x.sum().item(),
        lambda x: float(x.sum()),
        lambda x: bool((x > 0).all()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x[torch.tensor([0])],
        lambda x: x[[0, 1]],
        lambda x: torch.equal(x, x),
        lambda x: torch.tensor([1.0], device=x.device),
        lambda x: torch.ones(3).to(x.device),
        lambda x: torch.ones(3).to(x.device, non_blocking=True),
        lambda x: x.copy_(torch.ones(3)),
        lambda x: torch.cuda.synchronize(),
    ],
    ids=[
        "item",
        "float",
        "bool",
        "tolist",
        "cpu",
        "nonzero",
        "mask",
        "index",
        "list",
        "equal",
        "tensor",
        "to",
        "non_blocking",
        "copy_",
        "synchronize",
    ],
)
def test_a_wait_is_seen(gpu, waits):
    x = on_gpu(3)
    with gpu.watched() as seen:
        waits(x)
    assert len(seen.waits) >= 1
    assert "test_pretence.py:" in seen.waits[0][1]
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(Waited, match="synchronizing CUDA operation"):
            waits(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_what_does_not_wait_is_not_seen(gpu):
    x = on_gpu(3)
    parameter = torch.nn.Parameter(on_gpu(3))
    optimizer = torch.optim.Adam([parameter], lr=0.1)
    (parameter * x).sum().backward()
    pinned = torch.ones(3).pin_memory()
    with gpu.watched() as seen:
        torch.nn.utils.clip_grad_norm_([parameter], 1.0)
        optimizer.step()
        pinned.to("cuda", non_blocking=True)
        torch.zeros(3, device="cuda")
        torch.full((), 2.0, device="cuda")
        x[x > 0] = 2.0
        x[torch.zeros(1, dtype=torch.long, device="cuda")]
    assert seen.waits == []


def test_launches_are_counted_and_views_are_not(gpu):
    x, host = on_gpu(4, 4).requires_grad_(), torch.ones(4, 4)
    with gpu.watched() as seen:
        y = (x.t() @ x).view(16)[2:]
        host @ host
    assert seen.launches == {"mm": 1}
    with gpu.watched() as seen:
        y.backward(torch.ones_like(y))
    assert seen.launches["mm"] == 2


def test_memory_shared_by_entries_cannot_be_pinned():
    with pytest.raises(RuntimeError, match="single memory location"):
        torch.zeros(1).expand(3).pin_memory()
    with pytest.raises(RuntimeError, match="cannot pin"):
        on_gpu(2).pin_memory()


def test_a_fused_step_wants_gradients_laid_out_alike():
    parameter = torch.nn.Parameter(on_gpu(3, 2))
    parameter.grad = on_gpu(2, 3).t()
    with pytest.raises(RuntimeError, match="same dtype, device, and layout"):
        torch.optim.SGD([parameter], lr=0.1, fused=True).step()


def test_a_tensor_on_the_gpu_has_no_array():
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        on_gpu(2).numpy()


def test_an_index_out_of_range_stops_the_device():
    with pytest.raises(RuntimeError, match="device-side assert"):
        F.cross_entropy(on_gpu(1, 3), torch.full((1,), 3, device="cuda"))


def test_the_gpu_has_random_numbers_of_its_own():
    torch.manual_seed(0)
    first = torch.randn(3, device="cuda")
    begun = torch.get_rng_state()
    second = torch.randn_like(first)
    assert not torch.equal(first.cpu(), second.cpu())
    assert torch.equal(torch.get_rng_state(), begun)
    torch.manual_seed(0)
    assert torch.equal(torch.randn(3, device="cuda").cpu(), first.cpu())


def test_a_generator_serves_its_own_device():
    of_cpu, of_gpu = torch.Generator(), torch.Generator("cuda")
    torch.randn(2, generator=of_cpu)
    assert torch.randn(2, generator=of_gpu, device="cuda").is_cuda
    with pytest.raises(RuntimeError, match="Expected a 'cuda' device type for generator"):
        torch.randn(2, generator=of_cpu, device="cuda")
    with pytest.raises(RuntimeError, match="Expected a 'cpu' device type for generator"):
        torch.randn(2, generator=of_gpu)


def test_the_state_of_the_gpu_is_part_of_a_random_state():
    state = RandomState.capture()
    first = torch.rand(3, device="cuda")
    state.restore()
    assert torch.equal(torch.rand(3, device="cuda").cpu(), first.cpu())
