"""Losses that lack a derivative, and what is advised."""

from __future__ import annotations

import warnings

import pytest
import torch
from small_graphs import problem, three_vectors
from torch import nn
from torch.nn.functional import embedding_bag
from torch.utils.checkpoint import checkpoint

import mlo

X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
ENGINES = ["one_step", {"name": "unroll", "steps": 2}, "identity"]


def two_levels(net, loss, engine):
    """x is a scalar; `loss` is that of the network."""
    x = nn.ParameterDict({"v": torch.zeros((), dtype=torch.float64)})

    def sum_of_squares(x, _, *, net):
        return sum(p.square().sum() for p in net.parameters())

    return mlo.MultilevelOptimizer(
        [problem("net", loss, net), problem("x", sum_of_squares, x)], engine
    )


def test_a_problem_listed_too_late_is_named_through_others():
    with pytest.raises(
        mlo.ProblemError,
        match=r"reads net, which depends on 'reg' through aug, listed after it\..* list aug before "
        "'reg'",
    ):
        three_vectors(["net", "reg", "aug"]).step()


def test_every_problem_that_is_listed_too_late_is_named():
    with pytest.raises(
        mlo.ProblemError, match=r"It reads net, listed after it.* list aug, net before 'reg'"
    ):
        three_vectors(["reg", "aug", "net"]).step()


def test_no_order_is_advised_where_none_helps():
    with pytest.raises(mlo.ProblemError, match=r"or reads none\.$"):
        three_vectors(
            ["net", "aug", "reg"], reg_loss=lambda reg, _, *, net: net.v.detach().square().sum()
        ).step()


# ------------------------------ operations without a second derivative


def bag(weight, mode="mean"):
    return embedding_bag(torch.tensor([[0, 1], [2, 1]]), weight, mode=mode)


WITHOUT = {
    "bag": lambda w, x: (bag(w) - x).square().sum(),
    "gamma": lambda w, x: torch._standard_gamma(w.exp() + x.exp()).sum(),
    "margin": lambda w, x: x.exp() * nn.functional.multi_margin_loss(w, torch.zeros(3).long()),
    # Linear in w, so that its gradient depends on x alone.
    "linear": lambda w, x: (x.exp() * bag(w, "sum")).sum() + w.square().sum(),
    # Of what is read alone it is needed once, and it has a derivative.
    "of x": lambda w, x: (w - bag(x.expand(3, 2)).sum()).square().sum(),
}


def table():
    torch.manual_seed(0)
    return nn.ParameterDict({"v": torch.rand(3, 2, dtype=torch.float64)})


@pytest.mark.parametrize("operation", WITHOUT)
@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_an_operation_without_one_is_refused_before_a_move(engine, operation):
    net = table()
    loss = WITHOUT[operation]
    optimizer = two_levels(net, lambda net, _, *, x: loss(net["v"], x["v"]), engine)
    if operation == "of x":
        optimizer.step()
        return
    with pytest.raises(mlo.EngineError, match="'net': an operation in its loss has no double back"):
        optimizer.step()
    assert torch.equal(net["v"], table()["v"])


@pytest.mark.parametrize(
    ("engine", "needed"),
    [("one_step", False), ("identity", False), (ENGINES[1], True), ("neumann", True)],
    ids=str,
)
def test_a_derivative_that_an_engine_does_not_take_may_lack(engine, needed):
    """That of the gradient in the parameters themselves, under a learned weight decay."""
    net = table()
    optimizer = two_levels(
        net,
        lambda net, _, *, x: bag(net["v"]).square().sum() + x["v"].exp() * net["v"].square().sum(),
        engine,
    )
    if needed:
        with pytest.raises(mlo.EngineError, match="'net': an operation in its loss has no double"):
            optimizer.step()
        assert torch.equal(net["v"], table()["v"])
        return
    optimizer.step()
    assert optimizer.gradient("x")["v"] != 0.0


@pytest.mark.parametrize("engine", ["one_step", "identity", "darts"])
def test_a_gradient_penalty_through_batch_norm_is_accepted(engine):
    """Its gradient in the parameters cannot be differentiated in these, and need not be."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)).double()

    def loss(net, _, *, x):
        points = X.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(points).sum(), points, create_graph=True)
        return slope.square().mean() + x["v"].exp() * net(X).square().mean()

    two_levels(net, loss, engine).step()


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_an_operation_that_comes_later_is_named(engine):
    rounds = []

    def loss(net, _, *, x):
        own = bag(net["v"]) if rounds else net["v"]
        return (own - x["v"]).square().sum()

    optimizer = two_levels(table(), loss, engine)
    optimizer.step()
    rounds.append(None)
    with pytest.raises(mlo.EngineError, match=r"'net': .* has no double backward .*darts"):
        optimizer.step()


def test_what_a_middle_loss_reads_of_a_response_counts():
    """Its gradient flows through the response, by the operation's derivative."""
    modules = {name: table() for name in ("low", "middle", "top")}
    losses = {
        "low": lambda low, _, *, middle: (low["v"] - middle["v"]).square().sum(),
        "middle": lambda middle, _, *, low, top: (
            top["v"].sum() * bag(low["v"]).square().sum() + middle["v"].square().sum()
        ),
        "top": lambda top, _, *, middle: middle["v"].square().sum(),
    }
    problems = [problem(name, losses[name], module) for name, module in modules.items()]
    with pytest.raises(mlo.EngineError, match="'middle': an operation in its loss has no double"):
        mlo.MultilevelOptimizer(problems, "one_step").step()
    assert torch.equal(modules["middle"]["v"], table()["v"])


# ------------------------------ checks move nothing


class Frozen(nn.Module):
    """Moves a frozen parameter towards the mean of what it sees."""

    def __init__(self):
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(4, dtype=torch.float64), requires_grad=False)

    def forward(self, x):
        with torch.no_grad():
            self.mean.mul_(0.9).add_(0.1 * x.mean(0))
        return x - self.mean.clone()


class Exchanged(nn.Module):
    """Exchanges its buffer for another tensor."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.float64))

    def forward(self, x):
        self.calls = self.calls + 1.0
        return x


def linear():
    return nn.Linear(4, 4).double()


MOVING = {
    "batch norm": lambda: nn.BatchNorm1d(4, momentum=None).double(),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(linear()),
    "old spectral norm": lambda: nn.utils.spectral_norm(linear()),
    "noise": lambda: nn.Dropout(0.5),
    "frozen": Frozen,
    "exchanged": Exchanged,
}


class Checkpointed(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.a = nn.Linear(3, 4).double()
        self.moving = MOVING[kind]()
        self.also = nn.Linear(4, 1).double()

    def forward(self):
        again = checkpoint(
            lambda x: self.moving(self.a(x)).tanh(),
            X,
            use_reentrant=False,
            preserve_rng_state=False,
        )
        return self.also(again).square().mean()


def moved(net):
    """What a plain step has moved beside the trainable parameters, and the noise that comes."""
    frozen = {key: p for key, p in net.named_parameters() if not p.requires_grad}
    return {**dict(net.named_buffers()), **frozen, "noise": torch.rand(3)}


@pytest.mark.parametrize("kind", MOVING)
@pytest.mark.parametrize("engine", ["first_order", *ENGINES], ids=str)
def test_a_check_moves_nothing_that_checkpoints_run_again(engine, kind):
    plain, net = Checkpointed(kind), Checkpointed(kind)
    torch.manual_seed(1)
    plain().backward()
    expected = moved(plain)
    optimizer = two_levels(net, lambda net, _, *, x: x["v"].exp() * net(), engine)
    torch.manual_seed(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        next(optimizer.updates(1))
    found = moved(net)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
