"""Operations without a second derivative are found before an engine depends on them."""

from __future__ import annotations

import copy
import gc
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from functorch.compile import aot_function, nop
from squares import Square, SquareOnce
from torch import nn
from torch.nn.functional import embedding_bag
from torch.utils.checkpoint import checkpoint

import mlo
from mlo.advice import EngineAdvice
from mlo.errors import EngineError, ProblemError
from mlo.hypergradient import double_backward
from mlo.hypergradient.double_backward import (
    check_checkpointing,
    check_double_backward,
    check_silent_operations,
    explains_double_backward,
    is_about_double_backward,
)
from mlo.testing import Vector, relative_error


@pytest.fixture
def theta():
    return torch.linspace(-1.0, 1.0, 4, dtype=torch.float64).requires_grad_()


def test_a_loss_with_second_derivatives_is_accepted(theta):
    """A loss with second derivatives is accepted, and its graph is kept."""
    loss = Square.apply(theta).sin().sum()
    check_double_backward("w", loss, [theta])
    (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), theta)
    assert torch.allclose(second, 2.0 * (theta**2).cos() - 4.0 * theta**2 * (theta**2).sin())


def test_a_once_differentiable_function_is_named(theta):
    """PyTorch would take its second derivative for zero."""
    loss = (SquareOnce.apply(theta.sin()) * theta).sum()
    for check in (
        lambda: check_double_backward("w", loss, [theta]),
        lambda: check_silent_operations("w", loss),
    ):
        with pytest.raises(EngineError, match=r"'w'.*SquareOnce\.backward is once_differentiable"):
            check()


class HiddenTanh(torch.autograd.Function):
    """tanh, whose backward may leave no graph, as that of an adjoint solver or of a kernel."""

    @staticmethod
    def forward(ctx, x, way):
        ctx.save_for_backward(x)
        ctx.way = way
        return x.tanh()

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        if ctx.way == "no_grad":
            with torch.no_grad():
                return g * (1.0 - x.tanh() ** 2), None
        if ctx.way == "numpy":
            x = x.detach().numpy()
            return torch.from_numpy(g.detach().numpy() * (1.0 - np.tanh(x) ** 2)), None
        if ctx.way == "zero":
            return torch.zeros_like(g), None
        return g * (1.0 - x.tanh() ** 2), None


@pytest.mark.parametrize("way", ["no_grad", "numpy"])
@pytest.mark.parametrize("last", [True, False])
def test_a_backward_hidden_from_autograd_is_refused(theta, way, last):
    """Also where it is the last operation, which receives a constant."""
    loss = HiddenTanh.apply(theta, way)
    loss = loss.sum() if last else (loss * theta).square().sum()
    with pytest.raises(EngineError, match=r"'w': .*'HiddenTanh', whose backward.*or 'darts'"):
        check_silent_operations("w", loss)


@pytest.mark.parametrize("way", ["plain", "zero"])
def test_a_backward_in_plain_operations_is_accepted(theta, way):
    """So is one that is zero, which has no derivative to miss; the hooks are gone."""
    loss = HiddenTanh.apply(theta.sin(), way).square().sum()
    check_double_backward("w", loss, [theta])
    (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
    exact = torch.autograd.functional.hessian(lambda w: w.sin().tanh().square().sum(), theta)
    (found,) = torch.autograd.grad((gradient + 0.0 * theta).sum(), theta)
    assert torch.allclose(found, exact.sum(0) if way == "plain" else torch.zeros(4).double())
    gc.collect()
    functions = [held for held in gc.get_objects() if type(held) is types.FunctionType]
    assert not [held for held in functions if "_hidden_backward.<locals>" in held.__qualname__]


def test_darts_is_right_below_a_hidden_backward(recwarn):
    """It takes no second derivative, and is not compared with a wrong one."""
    slopes = {}
    for way, engine in (("no_grad", "darts"), ("plain", "one_step")):
        w, x = Vector(torch.tensor([0.3, -0.7])), Vector(torch.tensor([0.5, 1.0]))
        lower = mlo.Problem(
            "w",
            module=w.double(),
            optimizer=torch.optim.SGD(w.parameters(), lr=0.1),
            loss=lambda w, _, *, x, way=way: (HiddenTanh.apply(w.v, way) * x.v).sum(),
        )
        upper = mlo.Problem(
            "x",
            module=x.double(),
            optimizer=torch.optim.SGD(x.parameters(), lr=0.1),
            loss=lambda x, _, *, w: (w.v - 1.0).square().sum(),
        )
        slopes[way] = mlo.MultilevelOptimizer([lower, upper], engine).gradient("x")
    assert relative_error(slopes["no_grad"], slopes["plain"]) < 1e-6
    assert not recwarn.list


def hidden_above(engine, levels=2):
    """x → tanh, once with a hidden backward and once without: the slopes in x, by operation."""
    slopes = []
    for tanh in (lambda v: HiddenTanh.apply(v, "no_grad"), torch.tanh):
        w, x = Vector(torch.tensor([0.3, -0.7])), Vector(torch.tensor([0.5, 1.0]))
        top = Vector(torch.tensor([0.2]))

        def problem(name, module, loss):
            sgd = torch.optim.SGD(module.double().parameters(), lr=0.1)
            return mlo.Problem(name, module=module, optimizer=sgd, loss=loss, steps=2)

        problems = [
            problem("w", w, lambda w, _, *, x, tanh=tanh: (w.v * tanh(x.v) - 1).square().sum()),
            problem("x", x, lambda x, _, *, w: (w.v - 1.0).pow(4).sum() + x.v.square().sum()),
            problem("top", top, lambda top, _, *, x: (x.v - top.v).square().sum()),
        ]
        optimizer = mlo.MultilevelOptimizer(problems[:levels], engine)
        optimizer.step()
        slopes.append(optimizer.gradient("x"))
    return slopes


@pytest.mark.parametrize("engine", ["cg", {"name": "unroll", "steps": 2}])
def test_operations_above_the_parameters_are_accepted(engine):
    """The gradient in w does not go through them, so that the second derivative takes the first."""
    one, other = hidden_above(engine)
    assert relative_error(one, other) < 1e-12
    with pytest.raises(EngineError, match=r"'w': .*whose backward computes where autograd"):
        hidden_above("one_step", levels=3)  # there a gradient that contains it is differentiated


def test_only_operations_that_lead_to_the_parameters_count(theta):
    other = torch.ones(4, 1, dtype=torch.float64, requires_grad=True)
    norms = other.norm(dim=1, keepdim=True).detach()
    above = torch._weight_norm(other, norms, 0)
    loss = (above[:, 0] * theta.sin()).sum()
    check_double_backward("w", loss, [theta], once=True)
    check_silent_operations("w", loss, [theta.detach(), theta])
    for first in ([other], [above], [theta, other]):
        with pytest.raises(EngineError, match="weight_norm"):
            check_silent_operations("w", loss, first)
    with pytest.raises(EngineError, match="weight_norm"):
        check_double_backward("w", loss, [theta])


def test_finite_differences_are_not_advised_where_they_are_wrong(theta):
    """The gradient of scale_grad_by_freq is not that of the loss's value."""
    rows = nn.functional.embedding(torch.tensor([0, 0]), theta[:, None], scale_grad_by_freq=True)
    with pytest.raises(EngineError, match=r"weight the loss instead\.$"):
        check_silent_operations("w", rows.square().sum())


@pytest.mark.parametrize(
    "operation",
    [
        lambda w: torch._standard_gamma(w.exp()).sum(),
        lambda w: embedding_bag(torch.tensor([[0, 1]]), w[:, None]).square().sum(),
        lambda w: torch.segment_reduce(w, "sum", lengths=torch.tensor([1, 3])).square().sum(),
    ],
)
def test_an_operation_that_fails_when_it_is_run_is_named(theta, operation):
    with pytest.raises(EngineError, match=r"'w': .* no double backward \(.*not implemented"):
        check_double_backward("w", operation(theta), [theta])


def test_a_gradient_is_differentiated_in_all_leaves(theta):
    """It is linear in the parameter, and depends on the other leaf."""
    other = torch.ones((), dtype=torch.float64)
    loss = (other * embedding_bag(torch.tensor([[0, 1]]), theta[:, None], mode="sum")).sum()
    check_double_backward("w", loss, [theta])
    other.requires_grad_()
    loss = (other * embedding_bag(torch.tensor([[0, 1]]), theta[:, None], mode="sum")).sum()
    with pytest.raises(EngineError, match="no double backward"):
        check_double_backward("w", loss, [theta])


def test_other_errors_are_those_of_pytorch():
    advice = EngineAdvice()
    with (
        pytest.raises(RuntimeError, match=r"^out of memory$"),
        explains_double_backward("w", advice),
    ):
        raise RuntimeError("out of memory")


def test_a_constant_loss_has_nothing_to_refuse():
    check_double_backward("w", torch.tensor(1.0), [])


def test_reentrant_checkpointing_is_refused(theta):
    with pytest.raises(ProblemError, match="use_reentrant=False"):
        check_checkpointing("w", checkpoint(torch.sin, theta, use_reentrant=True).sum())
    check_checkpointing("w", checkpoint(torch.sin, theta, use_reentrant=False).sum())


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("derivative for aten::_flash_attention_backward is not implemented", True),
        ("trying to differentiate twice a function marked with @once_differentiable", True),
        ("CUDA out of memory", False),
        ("The size of tensor a (3) must match the size of tensor b (4)", False),
    ],
)
def test_only_missing_derivatives_count_as_such(message, expected):
    assert is_about_double_backward(RuntimeError(message)) is expected


def test_the_weight_norm_of_the_documentation_is_exact():
    page = Path(__file__).parents[4] / "docs" / "troubleshooting.md"
    code = page.read_text().partition("### Weight norm")[2].split("```python\n")[1].split("```")[0]
    names: dict[str, Any] = {}
    exec(code, names)
    torch.manual_seed(0)
    for layer, x in (
        (nn.Linear(4, 3).double(), torch.randn(2, 4).double()),
        (nn.Conv1d(4, 3, 2).double(), torch.randn(2, 4, 5).double()),
    ):
        ours = copy.deepcopy(layer)
        nn.utils.parametrize.register_parametrization(ours, "weight", names["WeightNorm"]())
        theirs = nn.utils.parametrizations.weight_norm(layer)
        with torch.no_grad():
            for parameter, same in zip(ours.parameters(), theirs.parameters(), strict=True):
                assert torch.allclose(parameter, same)
                same.copy_(parameter.mul_(1.5))
        assert torch.allclose(ours(x), theirs(x))
        parameters = dict(ours.named_parameters())

        def loss(*values, net=ours, x=x, keys=tuple(parameters)):
            made = torch.func.functional_call(net, dict(zip(keys, values, strict=True)), (x,))
            return made.square().sum()

        assert torch.autograd.gradgradcheck(loss, tuple(parameters.values()))
        check_double_backward("w", ours(x).square().sum(), list(ours.parameters()))
        with pytest.raises(EngineError, match=r"parametrization of your own.*troubleshooting\.md"):
            check_double_backward("w", theirs(x).square().sum(), list(theirs.parameters()))


def compiled(function):
    """As torch.compile makes it for most backends, in a fraction of the time."""
    return aot_function(function, fw_compiler=nop)


def test_compiled_code_has_no_second_derivative(theta):
    """PyTorch treats the exp that it has saved as constant: it would be zero, silently."""
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = compiled(lambda w, s: s.exp() * (w**2).sum())(theta, scale)
    (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
    assert torch.autograd.grad(gradient.sum(), scale, allow_unused=True) == (None,)
    for mixed in (True, False):
        with pytest.raises(EngineError, match=r"'w': .* that torch\.compile has compiled.*'darts'"):
            check_double_backward("w", loss, [theta], mixed=mixed)


def test_compiled_code_off_a_mixed_derivative_is_accepted(theta):
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    loss = compiled(lambda w: w.square().sum())(theta) + scale.exp() * theta.square().sum()
    check_double_backward("w", loss, [theta], mixed=True)
    with pytest.raises(EngineError, match="compiled"):
        check_double_backward("w", loss, [theta])


def test_compiled_code_is_refused_before_its_backward_runs(theta, monkeypatch):
    """PyTorch has given its saved tensors away, so a second pass ends in an error of its own."""

    def run(*_, **__):
        raise RuntimeError("donated buffers")

    monkeypatch.setattr(double_backward, "check_silent_operations", run)
    loss = compiled(lambda w: w.exp().sum())(theta)
    with pytest.raises(EngineError, match="compiled"):
        check_double_backward("w", loss, [theta])


def test_code_that_is_compiled_later_is_refused():
    net, up = Vector(torch.ones(2)), Vector(torch.zeros(1))
    plain, updates = lambda w, s: (s.exp() * w.square()).sum(), []

    def loss(net, _, *, up):
        return (compiled(plain) if len(updates) > 1 else plain)(net.v, up.v)

    sgd = [torch.optim.SGD(module.parameters(), lr=0.1) for module in (net, up)]
    problems = [
        mlo.Problem("net", module=net, optimizer=sgd[0], loss=loss, after_update=updates.append),
        mlo.Problem("up", module=up, optimizer=sgd[1], loss=lambda up, _, *, net: net.v.sum()),
    ]
    with pytest.raises(EngineError, match="compiled"):
        for _ in mlo.MultilevelOptimizer(problems, "one_step").run(5):
            pass
