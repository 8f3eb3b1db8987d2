"""`unroll` against plain autograd through the optimizer's steps written out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import mlo
from mlo.testing import Vector, bilevel_quadratic, relative_error

DECAY = 0.05


def sgd(p, g, s, t):
    g = g + DECAY * p
    s["m"] = g if t == 1 else 0.9 * s["m"] + g
    return p - 0.1 * s["m"]


def adam(p, g, s, t):
    s["m"] = 0.9 * s.get("m", torch.zeros_like(p)) + 0.1 * g
    s["v"] = 0.999 * s.get("v", torch.zeros_like(p)) + 0.001 * g**2
    return p - 0.1 * (s["m"] / (1 - 0.9**t)) / ((s["v"] / (1 - 0.999**t)).sqrt() + 1e-8)


OPTIMIZERS = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=DECAY), sgd),
    "adam": (lambda p: torch.optim.Adam(p, lr=0.1), adam),
}
BATCHES = [
    torch.randn(4, 3, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
    for k in range(5)
]


def w_loss(w, batch, x):
    return (torch.tanh(batch @ w) * torch.exp(x)).pow(2).mean() + torch.cosh(w - x.sum()).sum()


def x_loss(w, x):
    return (torch.sin(w) * w).sum() + 0.1 * (x**2).sum()


def make(optimizer, engine, steps):
    w, x = Vector(torch.linspace(-1, 1, 3).double()), Vector(torch.linspace(0.1, 0.4, 4).double())
    problems = [
        mlo.Problem(
            "w",
            module=w,
            optimizer=OPTIMIZERS[optimizer][0](w.parameters()),
            loss=lambda w, batch, *, x: w_loss(w.v, batch, x.v),
            data=BATCHES,
            steps=steps,
        ),
        mlo.Problem(
            "x",
            module=x,
            optimizer=torch.optim.SGD(x.parameters(), lr=1.0),
            loss=lambda x, _, *, w: x_loss(w.v, x.v),
        ),
    ]
    return mlo.MultilevelOptimizer(problems, engine)


def naive(optimizer, steps, kept):
    """The gradient through the last `kept` of `steps` steps from the fresh state; the ones before
    them are constants.
    """
    w, x = torch.linspace(-1, 1, 3).double(), torch.linspace(0.1, 0.4, 4).double().requires_grad_()
    state = {}
    for t in range(1, steps + 1):
        constant = t <= steps - kept
        w = w if w.requires_grad else w.requires_grad_()
        at = x.detach() if constant else x
        (g,) = torch.autograd.grad(
            w_loss(w, BATCHES[(t - 1) % 5], at), w, create_graph=not constant
        )
        w = OPTIMIZERS[optimizer][1](w, g, state, t)
        if constant:
            w, state = w.detach(), {key: value.detach() for key, value in state.items()}
    return torch.autograd.grad(x_loss(w, x), x)[0]


def gradient_of_the_first_round(optimizer):
    x = optimizer.problems["x"].module.v
    before = x.detach().clone()
    record = optimizer.step()
    return before - x.detach(), record


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("steps", "kept"), [(1, 1), (4, 4), (4, 2), (7, 7)])
def test_unroll_is_reverse_mode_through_its_steps(optimizer, steps, kept):
    found, record = gradient_of_the_first_round(make(optimizer, mlo.Unroll(steps=kept), steps))
    assert relative_error(found, naive(optimizer, steps, kept)) < 1e-10
    assert record.solves["w"].iterations == kept


def test_unrolling_one_step_is_one_step():
    one, _ = gradient_of_the_first_round(make("adam", "one_step", 3))
    unrolled, _ = gradient_of_the_first_round(make("adam", mlo.Unroll(steps=1), 3))
    assert relative_error(unrolled, one) < 1e-12


def test_many_steps_approach_the_implicit_derivative():
    """Many steps of a convex problem approach the implicit derivative."""
    problem = bilevel_quadratic()
    problem.problems[0].steps = 600
    problem.problems[1].optimizers["x"].param_groups[0]["lr"] = 1.0
    before = problem.value("x").clone()
    problem.optimizer(
        {"name": "unroll", "steps": 600}
    ).step()  # lr 0.1, eigenvalues of 0.1 to 1: (1 - 0.01)^600 is left
    assert relative_error(before - problem.value("x"), problem.exact) < 0.01


def test_dropout_is_replayed_in_every_step():
    def gradient(engine):
        torch.manual_seed(0)
        net, x = (
            nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 1)).double(),
            Vector(torch.zeros(4).double()),
        )
        problems = [
            mlo.Problem(
                "net",
                module=net,
                optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
                loss=lambda net, batch, *, x: (torch.exp(x.v) * net(batch).squeeze() ** 2).mean(),
                data=BATCHES,
                steps=2,
            ),
            mlo.Problem(
                "x",
                module=x,
                optimizer=torch.optim.SGD(x.parameters(), lr=1.0),
                loss=lambda x, _, *, net: (net[0].weight ** 2).sum(),
            ),
        ]
        optimizer = mlo.MultilevelOptimizer(problems, engine)
        optimizer.step()
        return -x.v.detach()

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Tanh(), nn.Linear(8, 1)).double()
    x = torch.zeros(4).double().requires_grad_()
    params = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    for batch in BATCHES[:2]:
        loss = (
            torch.exp(x) * torch.func.functional_call(net, params, (batch,)).squeeze() ** 2
        ).mean()
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        params = {name: p - 0.1 * g for (name, p), g in zip(params.items(), grads, strict=True)}
    (expected,) = torch.autograd.grad((params["0.weight"] ** 2).sum(), x)
    assert relative_error(gradient({"name": "unroll", "steps": 2}), expected) < 1e-10


def test_wrong_options_are_refused():
    with pytest.raises(mlo.EngineError, match="steps must be"):
        mlo.Unroll(steps=0)
    with pytest.raises(mlo.EngineError, match="'unroll' does not take these options"):
        mlo.engine_from({"name": "unroll", "products": "finite_difference"})
