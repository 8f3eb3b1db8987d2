"""Which of PyTorch's common operations have a wrong second or third derivative: the refused ones.

A new version of PyTorch that mends one, or breaks another, fails here.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradgradcheck

import mlo
from mlo.hypergradient.double_backward import NO_THIRD_DERIVATIVES, WRONG_SECOND_DERIVATIVES


def randn(*shape):
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def positive(*shape):
    return (randn(*shape).detach().abs() + 0.5).requires_grad_()


TARGETS = torch.tensor([0, 2, 1])
INDICES = torch.tensor([0, 1, 1, 3])

UNARY = {
    name: (getattr(torch, name), (randn(2, 3),))
    for name in ("tanh", "sigmoid", "exp", "sin", "cos", "erf", "sinh", "atan", "square", "expm1")
} | {
    name: (getattr(torch, name), (positive(2, 3),))
    for name in ("log", "sqrt", "rsqrt", "log1p", "reciprocal", "lgamma", "digamma", "log2")
}
ACTIVATIONS = {
    name: (getattr(F, name), (randn(2, 5),))
    for name in (
        "softplus",
        "silu",
        "gelu",
        "elu",
        "selu",
        "celu",
        "mish",
        "logsigmoid",
        "softsign",
    )
} | {
    "relu": (F.relu, (randn(2, 5),)),
    "leaky_relu": (F.leaky_relu, (randn(2, 5),)),
    "hardtanh": (F.hardtanh, (randn(2, 5),)),
    "hardswish": (F.hardswish, (randn(2, 5),)),
    "prelu": (F.prelu, (randn(2, 3), randn(3))),
    "glu": (F.glu, (randn(2, 6),)),
    "softmax": (lambda x: F.softmax(x, 1), (randn(2, 5),)),
    "log_softmax": (lambda x: F.log_softmax(x, 1), (randn(2, 5),)),
}
LINEAR = {
    "matmul": (torch.matmul, (randn(2, 3), randn(3, 4))),
    "bmm": (torch.bmm, (randn(2, 2, 3), randn(2, 3, 2))),
    "linear": (F.linear, (randn(2, 3), randn(4, 3), randn(4))),
    "bilinear": (F.bilinear, (randn(2, 3), randn(2, 2), randn(2, 3, 2))),
    "einsum": (lambda a, b: torch.einsum("ij,kj->ik", a, b), (randn(2, 3), randn(2, 3))),
    "solve": (
        torch.linalg.solve,
        ((randn(3, 3) + 3 * torch.eye(3)).detach().requires_grad_(), randn(3)),
    ),
    "conv1d": (lambda x, w: F.conv1d(x, w, padding=1), (randn(1, 2, 5), randn(2, 2, 3))),
    "conv2d": (lambda x, w, b: F.conv2d(x, w, b), (randn(1, 2, 4, 4), randn(2, 2, 3, 3), randn(2))),
    "conv2d, depthwise": (
        lambda x, w: F.conv2d(x, w, groups=2, stride=2),
        (randn(1, 2, 5, 5), randn(2, 1, 3, 3)),
    ),
    "conv_transpose2d": (F.conv_transpose2d, (randn(1, 2, 3, 3), randn(2, 1, 2, 2))),
    "embedding": (lambda w: F.embedding(INDICES, w), (randn(5, 2),)),
    "embedding, scaled": (
        lambda w: F.embedding(INDICES, w, scale_grad_by_freq=True).square(),
        (randn(5, 2),),
    ),
    "weight_norm": (lambda v, g: torch._weight_norm(v, g, 0), (randn(3, 4), randn(3, 1))),
    "weight_norm, by hand": (
        lambda v, g: v * (g / v.norm(dim=1, keepdim=True)),
        (randn(3, 4), randn(3, 1)),
    ),
    "cosine_similarity": (F.cosine_similarity, (randn(2, 3), randn(2, 3))),
}
NORMS = {
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (4,), w, b), (randn(3, 4), randn(4), randn(4))),
    "layer_norm, plain": (lambda x: F.layer_norm(x, (4,)), (randn(3, 4),)),
    "layer_norm, weight": (lambda x, w: F.layer_norm(x, (4,), w), (randn(3, 4), randn(4))),
    "layer_norm, bias": (lambda x, b: F.layer_norm(x, (4,), None, b), (randn(3, 4), randn(4))),
    "group_norm": (lambda x, w, b: F.group_norm(x, 2, w, b), (randn(2, 4, 3), randn(4), randn(4))),
    "instance_norm": (F.instance_norm, (randn(2, 3, 4),)),
    "rms_norm": (lambda x, w: F.rms_norm(x, (4,), w), (randn(3, 4), randn(4))),
    "batch_norm": (
        lambda x, w, b: F.batch_norm(x, None, None, w, b, training=True),
        (randn(4, 3), randn(3), randn(3)),
    ),
    "batch_norm, plain": (
        lambda x: F.batch_norm(x, None, None, training=True),
        (randn(4, 3),),
    ),
    "normalize": (F.normalize, (randn(2, 3),)),
    "norm": (lambda x: x.norm(), (randn(4),)),
}
LOSSES = {
    "cross_entropy": (lambda x: F.cross_entropy(x, TARGETS), (randn(3, 4),)),
    "cross_entropy, smoothed": (
        lambda x: F.cross_entropy(x, TARGETS, label_smoothing=0.1),
        (randn(3, 4),),
    ),
    "nll_loss": (lambda x: F.nll_loss(F.log_softmax(x, 1), TARGETS), (randn(3, 4),)),
    "bce_with_logits": (
        lambda x, t: F.binary_cross_entropy_with_logits(x, t.sigmoid()),
        (randn(5), randn(5)),
    ),
    "mse_loss": (F.mse_loss, (randn(4), randn(4))),
    "huber_loss": (F.huber_loss, (randn(4), randn(4))),
    "smooth_l1_loss": (F.smooth_l1_loss, (randn(4), randn(4))),
    "kl_div": (lambda x, t: F.kl_div(x.log_softmax(0), t.softmax(0)), (randn(4), randn(4))),
    "poisson_nll_loss": (lambda x: F.poisson_nll_loss(x, torch.ones(4).double()), (randn(4),)),
}
SHAPES = {
    "max_pool2d": (lambda x: F.max_pool2d(x, 2), (randn(1, 1, 4, 4),)),
    "avg_pool2d": (lambda x: F.avg_pool2d(x, 2), (randn(1, 1, 4, 4),)),
    "adaptive_avg_pool2d": (lambda x: F.adaptive_avg_pool2d(x, 1), (randn(1, 2, 3, 3),)),
    "interpolate": (
        lambda x: F.interpolate(x, scale_factor=2, mode="bilinear"),
        (randn(1, 1, 3, 3),),
    ),
    "grid_sample": (
        lambda x: F.grid_sample(x, torch.zeros(1, 2, 2, 2).double(), align_corners=False),
        (randn(1, 1, 3, 3),),
    ),
    "pad": (lambda x: F.pad(x, (1, 1), mode="reflect"), (randn(1, 4),)),
    "cumsum": (lambda x: x.cumsum(0), (randn(4),)),
    "cumprod": (lambda x: x.cumprod(0), (positive(4),)),
    "prod": (torch.prod, (positive(4),)),
    "logsumexp": (lambda x: x.logsumexp(0), (randn(4),)),
    "sort": (lambda x: x.sort().values.square(), (randn(4),)),
    "gather": (lambda x: x.gather(1, torch.tensor([[0], [2]])).square(), (randn(2, 3),)),
    "scatter_add": (
        lambda x: torch.zeros(3).double().scatter_add(0, torch.tensor([0, 0, 2, 1]), x).square(),
        (randn(4),),
    ),
    "var": (lambda x: x.var(), (randn(4),)),
    "pow": (lambda x, y: x**y, (positive(3), randn(3))),
    "where": (lambda x, y: torch.where(x.detach() > 0, x * y, y**2), (randn(3), randn(3))),
    "attention": (
        lambda q, k, v: (q @ k.transpose(-1, -2)).softmax(-1) @ v,
        (randn(2, 3), randn(2, 3), randn(2, 3)),
    ),
}
OPERATIONS = UNARY | ACTIVATIONS | LINEAR | NORMS | LOSSES | SHAPES
KNOWN_WRONG = {"weight_norm", "layer_norm, bias", "embedding, scaled"}


def is_right(name):
    function, inputs = OPERATIONS[name]
    torch.manual_seed(0)
    return gradgradcheck(function, inputs, raise_exception=False)


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - KNOWN_WRONG))
def test_a_common_operation_has_a_right_second_derivative(name):
    assert is_right(name)


@pytest.mark.parametrize("name", sorted(KNOWN_WRONG))
def test_an_operation_on_the_list_is_still_wrong_and_refused(name):
    """Where PyTorch has mended it, take it off the list."""
    assert not is_right(name)
    function, inputs = OPERATIONS[name]
    module = nn.ParameterList([tensor.detach().clone() for tensor in inputs])
    upper = nn.ParameterDict({"x": torch.ones(()).double()})

    def problems():
        return [
            mlo.Problem(
                "w",
                module=module,
                optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
                loss=lambda w, _, *, x: (function(*w) * x["x"]).square().sum(),
            ),
            mlo.Problem(
                "x",
                module=upper,
                optimizer=torch.optim.SGD(upper.parameters(), lr=0.1),
                loss=lambda x, _, *, w: sum(p.square().sum() for p in w),
            ),
        ]

    with pytest.raises(mlo.EngineError, match=r"second derivative is wrong in PyTorch") as refused:
        mlo.MultilevelOptimizer(problems(), "one_step").gradient("x")
    # Its first derivative is no slope of its value, so that no finite difference serves.
    assert ("'darts'" in str(refused.value)) == (name != "embedding, scaled")
    mlo.MultilevelOptimizer(problems(), "first_order").gradient("w")


def test_the_list_holds_what_is_tested():
    assert len(WRONG_SECOND_DERIVATIVES) == len(KNOWN_WRONG)
    assert len(OPERATIONS) > 75


# ------------------------------ third derivatives

LACKING = {
    "layer_norm",
    "layer_norm, plain",
    "layer_norm, weight",
    "instance_norm",
    "batch_norm",
    "batch_norm, plain",
}


def is_right_thrice(name):
    """Whether the second derivative of the gradient of a function of the operation is right."""
    function, inputs = OPERATIONS[name]

    def gradient(*inputs):
        torch.manual_seed(0)
        loss = (function(*inputs) ** 3).sum() + (function(*inputs) ** 2).sum()
        found = torch.autograd.grad(loss, inputs, create_graph=True)
        return tuple(entry for entry in found if entry.requires_grad)

    try:
        return gradgradcheck(gradient, inputs, raise_exception=False)
    except RuntimeError as error:
        if "3rd+ order" not in str(error):
            raise
        return False


@pytest.mark.parametrize("name", sorted(set(OPERATIONS) - KNOWN_WRONG - LACKING))
def test_a_common_operation_has_a_right_third_derivative(name):
    assert is_right_thrice(name)


@pytest.mark.parametrize("name", sorted(LACKING))
def test_an_operation_without_a_third_derivative_is_on_the_list(name):
    """Where PyTorch has mended it, take it off the list."""
    assert not is_right_thrice(name)
    function, inputs = OPERATIONS[name]
    names, waiting = set(), [function(*inputs).sum().grad_fn]
    while waiting:
        node = waiting.pop()
        if node is not None:
            names.add(node.name())
            waiting += [earlier for earlier, _ in node.next_functions]
    assert names & set(NO_THIRD_DERIVATIVES)
