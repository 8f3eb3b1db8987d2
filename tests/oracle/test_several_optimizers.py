"""One problem with several optimizers: gradients against plain autograd through both algorithms.

Matrices move by SGD with momentum and weight decay, vectors by Adam, as in programs that give
matrices to Muon and the rest to AdamW.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam
from torch.optim.lr_scheduler import ExponentialLR, ReduceLROnPlateau, StepLR

import mlo
from mlo.testing import relative_error

DECAY = {"matrices": 0.02, "vectors": 0.05}
MOMENTUM, LR, ADAM_LR, CLIP = 0.9, 0.2, 0.1, 0.5


def network():
    generator = torch.Generator().manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    draws = [torch.randn(10, 5, generator=generator, dtype=torch.float64) for _ in range(2)]
    return net, draws


def predict(named, x):
    hidden = torch.tanh(x @ named["0.weight"].T + named["0.bias"])
    return (hidden @ named["2.weight"].T + named["2.bias"])[:, 0]


def train(named, a, data):
    return (a.exp() * (predict(named, data[:, :4]) - data[:, 4]) ** 2).mean()


def valid(named, data):
    return ((predict(named, data[:, :4]) - data[:, 4]) ** 2).mean()


def as_list(matrices, vectors):
    return [matrices, vectors]


def as_dict(matrices, vectors):
    return {"matrices": matrices, "vectors": vectors}


def program(engine, collect=as_list, scheduler=None, **options):
    """`net` is trained on examples that `a` weighs."""
    net, (first, second) = network()
    weights = nn.ParameterDict({"v": torch.zeros(10, dtype=torch.float64)})
    matrices = [p for p in net.parameters() if p.ndim == 2]
    vectors = [p for p in net.parameters() if p.ndim == 1]
    optimizers = (
        SGD(matrices, lr=LR, momentum=MOMENTUM, weight_decay=DECAY["matrices"]),
        Adam(vectors, lr=ADAM_LR, weight_decay=DECAY["vectors"]),
    )
    problems = [
        mlo.Problem(
            "net",
            module=net,
            optimizer=collect(*optimizers),
            scheduler=None if scheduler is None else scheduler(*optimizers),
            loss=lambda net, _, *, a: train(dict(net.named_parameters()), a["v"], first),
            **options,
        ),
        mlo.Problem(
            "a",
            module=weights,
            optimizer=SGD(weights.parameters(), lr=0.0),
            loss=lambda a, _, *, net: valid(dict(net.named_parameters()), second),
        ),
    ]
    return mlo.MultilevelOptimizer(problems, engine)


def unrolled(steps, clip=None, rates=(1.0, 1.0)):
    """Autograd through `steps` steps of both optimizers, written by their formulas.

    Args:
        steps: number of steps.
        clip: largest norm of the whole gradient.
        rates: factors by which the two learning rates change after each step.
    """
    net, (first, second) = network()
    a = torch.zeros(10, dtype=torch.float64, requires_grad=True)
    theta = {name: p.detach().requires_grad_() for name, p in net.named_parameters()}
    m = {name: torch.zeros_like(p) for name, p in theta.items()}
    v = {name: torch.zeros_like(p) for name, p in theta.items()}
    for t in range(1, steps + 1):
        loss = train(theta, a, first)
        found = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
        g = dict(zip(theta, found, strict=True))
        if clip is not None:
            norm = torch.cat([entry.flatten() for entry in found]).norm()
            g = {
                name: entry * torch.clamp(clip / (norm + 1e-6), max=1.0)
                for name, entry in g.items()
            }
        after = {}
        for name, p in theta.items():
            if p.ndim == 2:
                d = g[name] + DECAY["matrices"] * p
                m[name] = MOMENTUM * m[name] + d
                after[name] = p - LR * rates[0] ** (t - 1) * m[name]
            else:
                d = g[name] + DECAY["vectors"] * p
                m[name] = 0.9 * m[name] + 0.1 * d
                v[name] = 0.999 * v[name] + 0.001 * d**2
                size = (v[name] / (1 - 0.999**t)).sqrt() + 1e-8
                rate = ADAM_LR * rates[1] ** (t - 1)
                after[name] = p - rate * m[name] / (1 - 0.9**t) / size
        theta = after
    return torch.autograd.grad(valid(theta, second), a)[0], theta


@pytest.mark.parametrize("collect", [as_list, as_dict])
@pytest.mark.parametrize("clip", [None, CLIP], ids=["free", "clipped"])
@pytest.mark.parametrize(
    ("engine", "steps"),
    [
        ({"name": "one_step", "keep_graph": False}, 1),
        ({"name": "one_step", "keep_graph": True}, 1),
        (mlo.Unroll(steps=3), 3),
    ],
    ids=["one_step", "kept graph", "unroll"],
)
def test_steps_of_several_optimizers_are_differentiated(engine, steps, clip, collect):
    optimizer = program(engine, collect, steps=steps, grad_clip=clip)
    optimizer.step()
    exact, theta = unrolled(steps, clip)
    reached = {name: p.detach() for name, p in optimizer.problems["net"].parameters.items()}
    assert relative_error(reached, {k: tensor.detach() for k, tensor in theta.items()}) < 1e-12
    assert relative_error(optimizer.gradient("a")["v"], exact) < 1e-9


def test_the_decay_of_each_optimizer_is_part_of_the_condition():
    optimizer = program({"name": "cg", "max_steps": 60, "tol": 1e-13, "damping": 3.0})
    optimizer.step()
    found = optimizer.gradient("a")["v"]
    _, (first, second) = network()
    theta = {
        k: p.detach().requires_grad_() for k, p in optimizer.problems["net"].parameters.items()
    }
    a = torch.zeros(10, dtype=torch.float64, requires_grad=True)
    names, tensors = list(theta), list(theta.values())

    def flat(entries):
        return torch.cat([entry.flatten() for entry in entries])

    gradient = flat(torch.autograd.grad(train(theta, a, first), tensors, create_graph=True))
    rows = [flat(torch.autograd.grad(entry, tensors, retain_graph=True)) for entry in gradient]
    decay = flat(
        [
            torch.full_like(theta[k], DECAY["matrices" if theta[k].ndim == 2 else "vectors"])
            for k in names
        ]
    )
    matrix = torch.stack(rows) + torch.diag(decay + 3.0)
    v = flat(torch.autograd.grad(valid(theta, second), tensors))
    exact = -torch.autograd.grad(gradient, a, torch.linalg.solve(matrix, v))[0]
    assert relative_error(found, exact) < 1e-8


SCHEDULERS = {
    "list": lambda first, second: [StepLR(first, 1, 0.5), ExponentialLR(second, 0.7)],
    "dict": lambda first, second: {
        "vectors": ExponentialLR(second, 0.7),
        "matrices": StepLR(first, 1, 0.5),
    },
}


@pytest.mark.parametrize("form", SCHEDULERS)
def test_each_optimizer_has_its_own_schedule(form):
    collect = as_list if form == "list" else as_dict
    optimizer = program(mlo.Unroll(steps=3), collect, SCHEDULERS[form], steps=3)
    optimizer.step()
    exact, theta = unrolled(3, rates=(0.5, 0.7))
    reached = {name: p.detach() for name, p in optimizer.problems["net"].parameters.items()}
    assert relative_error(reached, {k: tensor.detach() for k, tensor in theta.items()}) < 1e-12
    assert relative_error(optimizer.gradient("a")["v"], exact) < 1e-9


@pytest.mark.parametrize("form", SCHEDULERS)
def test_a_run_with_several_optimizers_resumes(form):
    collect = as_list if form == "list" else as_dict

    def make():
        return program("one_step", collect, SCHEDULERS[form])

    whole, first, second = make(), make(), make()
    list(whole.run(4))
    list(first.run(2))
    second.load_state_dict(first.state_dict())
    list(second.run(2))
    for key, parameter in whole.problems["net"].parameters.items():
        assert torch.equal(second.problems["net"].parameters[key], parameter)
    for key, torch_optimizer in whole.problems["net"].optimizers.items():
        rate = torch_optimizer.param_groups[0]["lr"]
        assert second.problems["net"].optimizers[key].param_groups[0]["lr"] == rate < LR


def test_one_scheduler_is_enough_and_several_may_drive_one():
    optimizer = program("one_step", as_list, lambda first, second: ExponentialLR(second, 0.5))
    optimizer.step()
    first, second = optimizer.problems["net"].optimizers.values()
    assert (first.param_groups[0]["lr"], second.param_groups[0]["lr"]) == (LR, ADAM_LR / 2)
    both = program(
        "one_step",
        as_list,
        lambda first, second: [StepLR(first, 1, 0.5), ExponentialLR(first, 0.5)],
    )
    both.step()
    assert both.problems["net"].optimizers["0"].param_groups[0]["lr"] == LR / 4


def test_a_plateau_scheduler_sees_the_problems_loss():
    optimizer = program(
        "one_step", as_list, lambda first, second: [ReduceLROnPlateau(second, patience=0)]
    )
    record = optimizer.step()
    assert optimizer.problems["net"].schedulers["0"].best == record.losses["net"]


def test_players_may_have_unlike_optimizers():
    """A game of a player with SGD (linear in its gradient) and one with Adam, both read above."""
    start = {"a": torch.tensor([0.3, -0.5]).double(), "b": torch.tensor([0.7, 0.2]).double()}
    pair = nn.ModuleDict({k: nn.ParameterDict({"v": v.clone()}) for k, v in start.items()})
    x = nn.ParameterDict({"v": torch.tensor([0.4, 0.9]).double()})

    def losses(a, b, x):
        return {"a": (a * b * x).sum() + (a**2).sum(), "b": ((b - a * x) ** 2).sum()}

    game = mlo.Problem(
        "pair",
        module=pair,
        players={"a": "a", "b": "b"},
        optimizer={
            "a": SGD(pair["a"].parameters(), lr=LR),
            "b": Adam(pair["b"].parameters(), ADAM_LR),
        },
        loss=lambda pair, _, *, x: losses(pair["a"]["v"], pair["b"]["v"], x["v"]),
    )
    upper = mlo.Problem(
        "x",
        module=x,
        optimizer=SGD(x.parameters(), lr=0.0),
        loss=lambda x, _, *, pair: (pair["a"]["v"].sin() * pair["b"]["v"]).sum(),
    )
    optimizer = mlo.MultilevelOptimizer([game, upper], "one_step")
    optimizer.step()
    a, b = (value.clone().requires_grad_() for value in start.values())
    u = x["v"].detach().requires_grad_()
    of = losses(a, b, u)
    (g,) = torch.autograd.grad(of["a"], a, create_graph=True)
    (h,) = torch.autograd.grad(of["b"], b, create_graph=True)
    # Adam's first step is h / (|h| + eps).
    after = (a - LR * g).sin() * (b - ADAM_LR * h / (h.abs() + 1e-8))
    (exact,) = torch.autograd.grad(after.sum(), u)
    assert relative_error(optimizer.gradient("x")["v"], exact) < 1e-9
