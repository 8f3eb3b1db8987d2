"""Weight decay of optimizers that nobody knows: a penalty of the loss, or decoupled from it."""

from __future__ import annotations

import warnings

import pytest
import torch

import mlo
from mlo.optimizer_traits import decays_outside_gradient
from mlo.testing import Vector, relative_error

A = torch.diag(torch.tensor([1.0, 2.0, 4.0]).double())
DECAY = 0.5


class Signed(torch.optim.Optimizer):
    """Lion's kind: moves by a sign, and shrinks the parameters beside it."""

    def __init__(self, params, lr=0.01, weight_decay=DECAY):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.mul_(1.0 - group["lr"] * group["weight_decay"])
                p.add_(p.grad.sign(), alpha=-group["lr"])


class Normalised(Signed):
    """Divides by the gradient's size, with decay as a part of it (Adam's kind) or beside it."""

    decoupled = False

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                g = p.grad if self.decoupled else p.grad + group["weight_decay"] * p
                square = self.state[p].setdefault("square", torch.zeros_like(p))
                square.mul_(0.9).addcmul_(g, g, value=0.1)
                p.addcdiv_(g, square.sqrt() + 1e-8, value=-group["lr"])
                if self.decoupled:
                    p.mul_(1.0 - group["lr"] * group["weight_decay"])


class NormalisedDecoupled(Normalised):
    decoupled = True


class Descent(Signed):
    """Gradient descent, where both kinds are the same."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(p.grad + group["weight_decay"] * p, alpha=-group["lr"])


class NeedsAClosure(Signed):
    """Cannot be tried by a bare step."""

    def step(self, closure=None):
        if closure is None:
            raise RuntimeError("step() needs a closure")


def pair(optimizer_class, *, engine="cg"):
    """w* = A⁻¹ x, or (A + c)⁻¹ x where decay is a penalty; x is judged by |w − 1|²."""
    x = Vector(torch.tensor([0.3, 0.2, 0.4]).double())
    w = Vector(torch.linalg.solve(A, x.v.detach()))
    problems = [
        mlo.Problem(
            "w",
            module=w,
            optimizer=optimizer_class(w.parameters()),
            loss=lambda w, _, *, x: 0.5 * w.v @ A @ w.v - w.v @ x.v,
        ),
        mlo.Problem(
            "x",
            module=x,
            optimizer=torch.optim.SGD(x.parameters(), lr=0.0),
            loss=lambda x, _, *, w: ((w.v - 1.0) ** 2).sum(),
        ),
    ]
    return mlo.MultilevelOptimizer(problems, engine), w


@pytest.mark.parametrize("kind", [Signed, NormalisedDecoupled])
def test_decoupled_decay_stays_out_of_the_hessian(kind):
    with pytest.warns(mlo.SolveWarning, match=rf"decoupled weight decay \({kind.__name__}\)"):
        optimizer, w = pair(kind)
    exact = torch.linalg.solve(A, 2.0 * (w.v.detach() - 1.0))
    assert relative_error(optimizer.gradient("x")["v"], exact) < 1e-10


@pytest.mark.parametrize("kind", [Normalised, Descent])
def test_decay_in_the_gradient_is_part_of_the_hessian(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer, w = pair(kind)
    penalised = A + DECAY * torch.eye(3).double()
    exact = torch.linalg.solve(penalised, 2.0 * (w.v.detach() - 1.0))
    assert relative_error(optimizer.gradient("x")["v"], exact) < 1e-10


def test_what_cannot_be_tried_is_said():
    with pytest.warns(mlo.SolveWarning, match="could not be found out by a trial step"):
        pair(NeedsAClosure)


def test_a_trial_leaves_the_optimizer_as_it_was():
    w = Vector(torch.ones(3).double())
    optimizer = Normalised(w.parameters())
    assert decays_outside_gradient(optimizer, optimizer.param_groups[0]) is False
    assert torch.equal(w.v, torch.ones(3).double()) and w.v.grad is None
    assert not optimizer.state


@pytest.mark.parametrize("name", ["AdamW", "Adam", "SGD", "RMSprop", "NAdam"])
def test_the_trial_agrees_with_what_is_known_of_torchs_own(name, monkeypatch):
    """As if their classes were a stranger's."""
    monkeypatch.setattr("mlo.optimizer_step.is_foreign", lambda optimizer: True)
    w = Vector(torch.ones(3).double())
    optimizer = getattr(torch.optim, name)(w.parameters(), lr=0.1, weight_decay=0.1)
    assert decays_outside_gradient(optimizer, optimizer.param_groups[0]) is (name == "AdamW")
