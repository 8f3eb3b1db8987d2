"""Gradients that are not asked for are not computed."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lfmcw_app.search_space import depthwise as depthwise_module
from lfmcw_app.search_space.depthwise import depthwise
from lfmcw_app.search_space.pointwise import PointwiseConv
from lfmcw_app.search_space.requested_gradients import autocasted


class Operators(TorchDispatchMode):
    """Records the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.__name__.partition(".")[0])
        return function(*args, **kwargs or {})


def operators_of_gradient(out, inputs, *, create_graph):
    with Operators() as found:
        torch.autograd.grad(out.sum(), inputs, create_graph=create_graph)
    return found.names


@pytest.mark.parametrize("create_graph", [False, True])
def test_gradients_that_are_not_asked_for_are_not_computed(create_graph, monkeypatch):
    """A generator's loss is differentiated through a discriminator whose weights require gradients,
    but not theirs.
    """
    monkeypatch.setattr(depthwise_module, "LARGE", 0)
    x = torch.randn(2, 40, 6, 6).contiguous(memory_format=torch.channels_last)
    x.requires_grad_()
    weight = torch.nn.Parameter(torch.randn(40, 1, 5, 5))
    # The gradient in x is a convolution itself, the one in the weight is made of PyTorch's own
    # gradients.
    named = operators_of_gradient(
        depthwise(x.sin(), weight), (x, weight), create_graph=create_graph
    )
    assert {"convolution", "convolution_backward"} <= set(named)
    alone = operators_of_gradient(depthwise(x.sin(), weight), x, create_graph=create_graph)
    assert "convolution" in alone and "convolution_backward" not in alone
    alone = operators_of_gradient(depthwise(x.sin(), weight), weight, create_graph=create_graph)
    assert "convolution" not in alone and "convolution_backward" in alone

    pointwise = PointwiseConv(20, 20, groups=2)
    both, of_x, of_weight = (
        operators_of_gradient(pointwise(x.sin()), inputs, create_graph=create_graph).count("bmm")
        for inputs in ((x, pointwise.weight), x, pointwise.weight)
    )
    assert (both, of_x, of_weight) == (2, 1, 1)


def test_all_gradients_are_computed_where_pytorch_does_not_tell(monkeypatch):
    monkeypatch.delattr(torch._C, "_will_engine_execute_node")
    x = torch.randn(2, 40, 4, 4, requires_grad=True)
    pointwise = PointwiseConv(20, 20, groups=2)
    named = operators_of_gradient(pointwise(x.sin()), x, create_graph=False)
    assert named.count("bmm") == 2


def test_under_autocast_all_inputs_are_of_its_type():
    single, double = torch.ones(2), torch.ones(2, dtype=torch.float64)
    assert all(a is b for a, b in zip(autocasted(single, double), (single, double), strict=True))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert [x.dtype for x in autocasted(single, double)] == [torch.bfloat16, torch.float64]
