"""Depthwise convolutions."""

from __future__ import annotations

import pytest
import torch
from nested_gradients import nested
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from lfmcw_app.search_space import depthwise as depthwise_module
from lfmcw_app.search_space.depthwise import depthwise
from mlo.testing import relative_error


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("size", [6, 7])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
def test_a_depthwise_convolution_has_pytorchs_derivatives(
    kernel, stride, dilation, size, large, monkeypatch
):
    """A depthwise convolution has PyTorch's derivatives of every order."""
    if large:  # which takes other ways
        monkeypatch.setattr(depthwise_module, "LARGE", 0)
    torch.manual_seed(0)
    x = torch.randn(2, 3, size, size, dtype=torch.float64).contiguous(
        memory_format=torch.channels_last
    )
    inputs = (
        x.requires_grad_(),
        torch.randn(3, 1, kernel, kernel, dtype=torch.float64, requires_grad=True),
    )
    padding = dilation * (kernel // 2)
    expected = nested(lambda x, w: F.conv2d(x, w, None, stride, padding, dilation, 3), inputs)

    def ours(x, w):
        return depthwise(x, w, stride=stride, dilation=dilation)

    assert relative_error(nested(ours, inputs), expected) < 1e-12
    for wanted in (inputs, inputs[:1], inputs[1:]):  # where no graph of the gradient is wanted
        found = torch.autograd.grad(ours(*inputs).sin().sum(), wanted)
        exact = torch.autograd.grad(
            F.conv2d(*inputs, None, stride, padding, dilation, 3).sin().sum(), wanted
        )
        assert relative_error(dict(enumerate(found)), dict(enumerate(exact))) < 1e-12


@pytest.mark.parametrize("size", [(5, 6), (6, 5)])
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [1, 2])
def test_derivatives_are_finite_differences(stride, dilation, size):
    generator = torch.Generator().manual_seed(0)
    inputs = tuple(
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((1, 2, *size), (2, 1, 3, 3))
    )

    def ours(x, w):
        return depthwise(x, w, stride=stride, dilation=dilation)

    assert torch.autograd.gradcheck(ours, inputs)
    assert torch.autograd.gradgradcheck(ours, inputs)


class Convolutions(TorchDispatchMode):
    """Counts convolutions and gradients of them."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "convolution" in function.__name__
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_a_hessian_product_takes_no_convolution_per_channel(kernel, stride, dilation):
    x = torch.randn(2, 32, 8, 8).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(32, 1, kernel, kernel, requires_grad=True)
    inputs = x.requires_grad_(), weight
    out = depthwise(*inputs, stride=stride, dilation=dilation)
    gradient = torch.autograd.grad(out.square().sum(), inputs, create_graph=True)
    with Convolutions() as found:
        torch.autograd.grad([g.sum() for g in gradient], inputs)
    assert 0 < found.count <= 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_under_autocast_it_is_pytorchs(stride, dilation, dtype):
    """In bfloat16, but for double precision, and with gradients of the inputs' own type."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 8, 8, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(4, 1, 3, 3, generator=generator).to(dtype).requires_grad_()
    found = []
    for function in (
        lambda: depthwise(x, weight, stride=stride, dilation=dilation),
        lambda: F.conv2d(x, weight, None, stride, dilation, dilation, 4),
    ):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = function()
        gradient = torch.autograd.grad(out.float().square().sum(), (x, weight), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in gradient), (x, weight))
        found.append((out, *gradient, *second))
    for ours, theirs in zip(*found, strict=True):
        assert ours.dtype == theirs.dtype
        distance = relative_error({"": ours.detach().double()}, {"": theirs.detach().double()})
        assert distance < (0.02 if dtype == torch.float32 else 1e-6)
