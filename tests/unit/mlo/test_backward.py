"""`grad` beside `torch.autograd.grad`: the same numbers, graphs and refusals."""

from __future__ import annotations

import pytest
import torch
from torch.overrides import TorchFunctionMode

from mlo import backward
from mlo.backward import grad


def case():
    torch.manual_seed(0)
    a, b, unused = (torch.randn(3, requires_grad=True) for _ in range(3))
    return a, b, unused, (a * b).sin(), a.exp()


def test_it_is_pytorchs():
    a, b, unused, y, z = case()
    v = [torch.randn(3), torch.randn(3)]
    expected = torch.autograd.grad([y, z], [a, b, unused], v, retain_graph=True, allow_unused=True)
    found = grad([y, z], [a, b, unused], v)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    assert found[2] is None and expected[2] is None
    with pytest.raises(RuntimeError, match="second time"):  # the graph was released
        grad([y, z], [a], v)


def test_a_scalar_needs_no_cotangent():
    a = torch.tensor([1.0, 2.0], requires_grad=True)
    (found,) = grad([(a**2).sum()], [a])
    assert torch.equal(found, torch.tensor([2.0, 4.0]))


def test_its_gradient_can_be_differentiated():
    a = torch.tensor([1.0, 2.0], requires_grad=True)
    (first,) = grad([(a**3).sum()], [a], create_graph=True)
    (second,) = grad([first.sum()], [a])
    assert torch.equal(second, 6.0 * a.detach())


def test_a_cotangent_of_another_shape_is_refused():
    a, _, _, y, _ = case()
    with pytest.raises(RuntimeError, match="shape"):
        grad([y], [a], [torch.ones(4)])


def test_no_gradient_is_left_in_leaves():
    a, b, _, y, _ = case()
    grad([y], [a], [torch.ones(3)])
    assert a.grad is None and b.grad is None


def test_a_mode_sees_the_call():
    seen = []

    class Watching(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    a, _, _, y, _ = case()
    with Watching():
        grad([y], [a], [torch.ones(3)])
    assert torch.autograd.grad in seen


def test_a_pytorch_without_that_function_gives_the_same(monkeypatch):
    a, b, unused, y, z = case()
    v = [torch.randn(3), torch.randn(3)]
    expected = grad([y, z], [a, b, unused], v, retain_graph=True)
    monkeypatch.setattr(backward, "_HOLDER", None)
    found = grad([y, z], [a, b, unused], v)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert found[2] is None


def test_a_wrapped_engine_sees_the_pass(monkeypatch):
    engine, passes = torch.autograd.Variable._execution_engine, []

    class Counting:
        def run_backward(self, *args, **kwargs):
            passes.append(args)
            return engine.run_backward(*args, **kwargs)

    monkeypatch.setattr(torch.autograd.Variable, "_execution_engine", Counting())
    a, _, _, y, _ = case()
    grad([y], [a], [torch.ones(3)])
    assert len(passes) == 1
