"""The known traps of hypergradients (DESIGN section 4), each against an oracle; each fails when its
guard is taken out.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.func import functional_call

import mlo
from mlo.tensors import map_tensors
from mlo.testing import Vector, identical, relative_error, snapshot


class Net(nn.Module):
    """A smooth network with dropout and BatchNorm, in float64."""

    def __init__(self, dropout=0.3, norm=True):
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6) if norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Linear(6, 1)
        self.double()

    def forward(self, x):
        return self.second(self.dropout(torch.tanh(self.norm(self.first(x)))))


def data(seed, count=16, batch=8):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    return [
        (x[i : i + batch], torch.sin(x[i : i + batch].sum(1, keepdim=True)))
        for i in range(0, count, batch)
    ]


def make(engine="one_step", *, dropout=0.3, norm=True, **options):
    torch.manual_seed(0)
    net, weights = Net(dropout, norm), Vector(torch.linspace(-0.5, 0.5, 8, dtype=torch.float64))

    def net_loss(net, batch, *, weights):
        x, y = batch
        return (torch.exp(weights.v) * ((net(x) - y) ** 2).squeeze(1)).mean()

    def weights_loss(weights, batch, *, net):
        x, y = batch
        return ((net(x) - y) ** 2).mean()

    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    lower = mlo.Problem(
        "net", module=net, optimizer=optimizer, loss=net_loss, data=data(1), **options
    )
    upper = mlo.Problem(
        "weights",
        module=weights,
        optimizer=torch.optim.SGD(weights.parameters(), lr=1.0),
        loss=weights_loss,
        data=data(2),
    )
    return mlo.MultilevelOptimizer([lower, upper], hypergradient=engine)


def naive(optimizer, *, batches=1):
    """One fresh SGD step of the net and the upper loss, as one differentiable program with the same
    noise.
    """
    net = copy.deepcopy(optimizer.problems["net"].module)
    v = optimizer.problems["weights"].module.v.detach().clone().requires_grad_()
    params = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    with torch.random.fork_rng():
        loss = 0.0
        for x, y in data(1)[:batches]:
            loss = (
                loss
                + (torch.exp(v) * ((functional_call(net, params, (x,)) - y) ** 2).squeeze(1)).mean()
                / batches
            )
        grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
        moved = {
            name: p - 0.05 * (g + 0.01 * p)
            for (name, p), g in zip(params.items(), grads, strict=True)
        }
        x, y = data(2)[0]
        (gradient,) = torch.autograd.grad(((functional_call(net, moved, (x,)) - y) ** 2).mean(), v)
    return gradient


@pytest.mark.parametrize(("engine", "tolerance"), [("one_step", 1e-10), ("darts", 1e-6)])
def test_dropout_masks_are_replayed_in_every_re_evaluation(engine, tolerance):
    optimizer = make(engine)
    expected = naive(optimizer)
    assert relative_error(optimizer.gradient("weights")["v"], expected) < tolerance
    before = optimizer.problems["weights"].module.v.detach().clone()
    optimizer.step()
    assert (
        relative_error(before - optimizer.problems["weights"].module.v.detach(), expected)
        < tolerance
    )


@pytest.mark.filterwarnings("ignore:The gradient of problem .weights. is zero")
@pytest.mark.parametrize("engine", ["one_step", "darts", "direct"])
def test_buffers_move_only_in_their_problems_own_update(engine):
    optimizer = make(engine, dropout=0.0)
    optimizer.step()
    optimizer.gradient("weights")
    norm = optimizer.problems["net"].module.norm
    assert int(norm.num_batches_tracked) == 1
    first = make("first_order", dropout=0.0)
    first.step()
    assert torch.equal(first.problems["net"].module.norm.running_mean, norm.running_mean)


@pytest.mark.parametrize("engine", ["one_step", "darts", "direct"])
def test_live_parameters_are_never_moved_by_products(engine):
    optimizer = make(engine)
    optimizer.step()
    before = snapshot(optimizer)
    for _ in range(3):
        optimizer.gradient("weights")
    assert identical(before, snapshot(optimizer))


def test_the_derivative_is_taken_where_the_step_was_made():
    """After its update the net has other parameters and, with two steps, another batch than in the
    first one.
    """
    optimizer = make()
    optimizer.step()
    expected = optimizer.gradient("weights")["v"]
    with torch.no_grad():  # what the live parameters are does not enter the step that led to them
        recorded = optimizer._now.find("net").evaluation.parameters
        assert all(
            not torch.equal(recorded[k], p) for k, p in optimizer.problems["net"].parameters.items()
        )
    assert torch.equal(optimizer.gradient("weights")["v"], expected)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_accumulation_averages_values_and_derivatives(accumulate):
    """Accumulation averages the batches in value and derivative."""
    optimizer = make(dropout=0.3, accumulate=accumulate)
    expected = naive(optimizer, batches=accumulate)
    assert relative_error(optimizer.gradient("weights")["v"], expected) < 1e-10


def test_accumulation_needs_one_inverse_product(monkeypatch):
    """Each inverse product is done once, however many batches are accumulated."""
    from mlo.hypergradient.one_step import OneStep

    solves = []
    original = OneStep.solve
    monkeypatch.setattr(
        OneStep, "solve", lambda *arguments: solves.append(1) or original(*arguments)
    )
    optimizer = make()
    upper = optimizer.problems["weights"]
    upper.accumulate = 2
    optimizer.step()
    assert len(solves) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_adaptive_difference_step_suits_the_dtype(dtype):
    def gradient(engine, dtype):
        optimizer = make(engine, dropout=0.0, norm=False)
        for problem in optimizer.problems.values():
            problem.module.to(dtype)
            problem.data[:] = map_tensors(problem.data, lambda tensor: tensor.to(dtype))
        return optimizer.gradient("weights")["v"].double()

    exact = gradient("one_step", torch.float64)
    assert relative_error(gradient("darts", dtype), exact) < (
        1e-3 if dtype == torch.float32 else 1e-7
    )


# ------------------------------ a game is not a minimisation


def game(engine):
    """A bilinear-quadratic game: a minimises ½ aᵀPa + aᵀCb − aᵀx, b minimises ½ bᵀQb − aᵀCb −
    bᵀx.
    """
    generator = torch.Generator().manual_seed(4)
    c = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    p, q = (
        torch.diag(torch.tensor([1.0, 2.0, 3.0]).double()),
        torch.diag(torch.tensor([2.0, 1.0, 1.5]).double()),
    )
    x = torch.randn(3, generator=generator, dtype=torch.float64)
    # F = (P a + C b − x, Q b − Cᵀ a − x) = 0
    jacobian = torch.cat([torch.cat([p, c], 1), torch.cat([-c.T, q], 1)], 0)
    solution = torch.linalg.solve(jacobian, torch.cat([x, x]))
    module = nn.Module()
    module.a, module.b = Vector(solution[:3]), Vector(solution[3:])

    def loss(game, batch, *, x):
        a, b = game.a.v, game.b.v
        coupling = a @ c @ b
        return {
            "first": 0.5 * a @ p @ a + coupling - a @ x.v,
            "second": 0.5 * b @ q @ b - coupling - b @ x.v,
        }

    upper = Vector(x)
    t = torch.linspace(0, 1, 3, dtype=torch.float64)
    problems = [
        mlo.Problem(
            "game",
            module=module,
            players={"first": "a", "second": "b"},
            optimizer={
                "first": torch.optim.SGD(module.a.parameters(), lr=0.1),
                "second": torch.optim.SGD(module.b.parameters(), lr=0.2),
            },
            loss=loss,
        ),
        mlo.Problem(
            "x",
            module=upper,
            optimizer=torch.optim.SGD(upper.parameters(), lr=0.1),
            loss=lambda x, _, *, game: 0.5 * ((game.a.v - t) ** 2).sum(),
        ),
    ]
    v = torch.cat([solution[:3] - t, torch.zeros(3, dtype=torch.float64)])
    exact = torch.linalg.solve(jacobian.T, v).view(2, 3).sum(0)
    return mlo.MultilevelOptimizer(problems, engine), exact, solution, t


@pytest.mark.filterwarnings("ignore:.*solves with finite differences")
@pytest.mark.parametrize("products", ["autograd", "finite_difference"])
def test_direct_solves_the_transposed_jacobian_of_a_game(products):
    optimizer, exact, *_ = game(mlo.Direct(products=products))
    assert relative_error(optimizer.gradient("x")["v"], exact) < (
        1e-12 if products == "autograd" else 1e-8
    )


@pytest.mark.parametrize("engine", ["one_step", "darts"])
def test_one_step_of_a_game_is_the_simultaneous_update(engine):
    optimizer, _, solution, t = game(engine)
    # a' = a − 0.1 F_a with ∂F_a/∂x = −1, and the upper loss reads a alone.
    assert relative_error(optimizer.gradient("x")["v"], 0.1 * (solution[:3] - t)) < 1e-9


def test_a_games_loss_must_name_its_players():
    optimizer, *_ = game("one_step")
    optimizer.problems["game"].loss = lambda game, batch, *, x: {"first": game.a.v.sum()}
    with pytest.raises(mlo.ProblemError, match="returned the players \\['first'\\]"):
        optimizer.gradient("x")
