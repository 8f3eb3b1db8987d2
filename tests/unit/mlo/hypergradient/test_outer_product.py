"""`outer_product`: the Hessian replaced by the outer product of the gradient."""

from __future__ import annotations

import pytest
import torch

import mlo
from mlo.testing import Vector, relative_error

DECAY = 0.3
W = torch.tensor([0.4, -0.9, 0.2]).double()
X = torch.tensor([0.7, 0.1]).double()


def lower(w, x):
    return (w.sin() * x.exp().sum()).sum() + (w[:2] * x).pow(2).sum() + w.pow(4).sum()


def make(engine, start=W):
    w, x = Vector(start), Vector(X)
    problems = [
        mlo.Problem(
            "w",
            module=w,
            optimizer=torch.optim.SGD(w.parameters(), lr=0.0, weight_decay=DECAY),
            loss=lambda w, _, *, x: lower(w.v, x.v),
        ),
        mlo.Problem(
            "x",
            module=x,
            optimizer=torch.optim.SGD(x.parameters(), lr=0.0),
            loss=lambda x, _, *, w: w.v.pow(3).sum() + x.v.cos().sum(),
        ),
    ]
    return mlo.MultilevelOptimizer(problems, engine)


@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_it_follows_its_equation(damping):
    """−(gᵀv / (‖g‖² + damping)) ∇ₓL, with the optimizer's weight decay in g."""
    w, x = W.clone().requires_grad_(), X.clone().requires_grad_()
    g, h = torch.autograd.grad(lower(w, x), [w, x])
    g = g + DECAY * W
    v = 3.0 * W**2
    expected = -X.sin() - (g @ v) / (g @ g + damping) * h
    optimizer = make(mlo.OuterProduct(damping=damping))
    assert relative_error(optimizer.gradient("x")["v"], expected) < 1e-14
    assert optimizer.step().solves["w"].converged


def test_undamped_it_keeps_the_lower_loss_at_its_value():
    """The response is the shortest one along a level set: g · dw + h · dx = 0, with dw along g."""
    w, x = W.clone().requires_grad_(), X.clone().requires_grad_()
    g, h = torch.autograd.grad(lower(w, x) + 0.5 * DECAY * w.pow(2).sum(), [w, x])
    direct = -X.sin()
    found = make("outer_product").gradient("x")["v"] - direct
    # The pullback of v is that of dw = −g (h · dx) / ‖g‖².
    jacobian = -torch.outer(g, h) / (g @ g)
    assert relative_error(found, jacobian.T @ (3.0 * W**2)) < 1e-14
    assert float((g @ jacobian + h).norm()) < 1e-12


def solved():
    """A minimum of the lower loss, by Newton's method."""
    w = W.clone()
    for _ in range(50):
        hessian = torch.autograd.functional.hessian(
            lambda w: lower(w, X) + 0.5 * DECAY * w.pow(2).sum(), w
        )
        w.requires_grad_()
        (g,) = torch.autograd.grad(lower(w, X) + 0.5 * DECAY * w.pow(2).sum(), w)
        w = (w - torch.linalg.solve(hessian, g)).detach()
    return w


def test_at_a_solution_it_says_that_it_means_nothing():
    with pytest.warns(mlo.SolveWarning, match="lower gradient has vanished"):
        assert not make("outer_product", solved()).step().solves["w"].converged
    damped = make({"name": "outer_product", "damping": 1.0}, solved())
    assert damped.step().solves["w"].converged
    assert relative_error(damped.gradient("x")["v"], -X.sin()) < 1e-6
