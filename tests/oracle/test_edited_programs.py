"""What users change behind the optimizer's back: followed, refused, or impossible."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import mlo
from mlo.testing import relative_error


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 1)
        self.double()

    def forward(self, x):
        return self.last(torch.tanh(self.first(x)))


X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def make(engine="one_step", *, freeze=False, steps=2):
    net, a = Net(), nn.ParameterDict({"v": torch.zeros(12).double()})
    if freeze:
        net.first.requires_grad_(False)
    used = [p for p in net.parameters() if p.requires_grad]
    problems = [
        mlo.Problem(
            "net",
            module=net,
            optimizer=torch.optim.SGD(used, lr=0.1),
            loss=lambda net, _, *, a: (a["v"].exp() * net(X)[:, 0] ** 2).mean(),
            steps=steps,
        ),
        mlo.Problem(
            "a",
            module=a,
            optimizer=torch.optim.SGD(a.parameters(), lr=0.1),
            loss=lambda a, _, *, net: ((net(X)[:, 0] - 1.0) ** 2).mean(),
        ),
    ]
    return mlo.MultilevelOptimizer(problems, engine), net, a


def assign(net):
    net.load_state_dict({k: v.clone() for k, v in net.state_dict().items()}, assign=True)


def replace_a_parameter(net):
    net.last.weight = nn.Parameter(net.last.weight.detach().clone())


def replace_a_module(net):
    net.last = nn.Linear(4, 1).double()


def add_a_parameter(net):
    net.register_parameter("more", nn.Parameter(torch.zeros(1).double()))


def add_a_module(net):
    net.extra = nn.Linear(1, 1)


def remove_a_parameter(net):
    net.last.register_parameter("bias", None)


def freeze(net):
    net.first.requires_grad_(False)


EDITS = [
    assign,
    replace_a_parameter,
    replace_a_module,
    add_a_parameter,
    add_a_module,
    remove_a_parameter,
    freeze,
]


@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.__name__)
@pytest.mark.parametrize("engine", ["one_step", "cg", "first_order"])
def test_an_edited_module_is_refused(edit, engine):
    for act in (lambda optimizer: optimizer.gradient("net"), lambda optimizer: optimizer.step()):
        optimizer, net, _ = make(engine)
        edit(net)
        with pytest.raises(mlo.ProblemError, match=r"module of problem 'net' was edited"):
            act(optimizer)


def test_an_edit_during_a_run_is_noticed_in_the_next_round():
    optimizer, net, _ = make()
    list(optimizer.run(2))
    replace_a_module(net)
    with pytest.raises(mlo.ProblemError, match="was edited"):
        optimizer.step()
    assert optimizer.round == 2


def test_unfreezing_later_is_refused():
    """The optimizer does not hold these parameters, so they would never move."""
    optimizer, net, _ = make(freeze=True)
    optimizer.step()
    net.first.requires_grad_(True)
    with pytest.raises(mlo.ProblemError, match="was frozen requires a gradient now"):
        optimizer.step()


def test_values_may_be_changed_in_place():
    optimizer, net, _ = make("identity")
    optimizer.step()
    with torch.no_grad():
        net.last.weight.mul_(0.5)
    net.first.load_state_dict({k: v * 0.9 for k, v in net.first.state_dict().items()})
    net.eval()
    net.train()
    optimizer.step()
    other, copy, a = make("identity")
    copy.load_state_dict(net.state_dict())
    with torch.no_grad():
        a["v"].copy_(optimizer.problems["a"].parameters["v"])
    assert relative_error(other.gradient("a")["v"], optimizer.gradient("a")["v"]) < 1e-12


@pytest.mark.parametrize(
    ("setting", "value"),
    [("steps", 7), ("data", [1]), ("module", nn.Linear(1, 1)), ("name", "w"), ("generators", ())],
)
def test_settings_that_are_read_once_are_read_only(setting, value):
    optimizer, *_ = make()
    with pytest.raises(mlo.ProblemError, match=rf"{setting} is read when a MultilevelOptimizer"):
        setattr(optimizer.problems["net"], setting, value)


def test_settings_that_are_read_every_time_may_be_changed():
    optimizer, *_ = make()
    problem = optimizer.problems["net"]
    problem.grad_clip, problem.warmup_steps, problem.accumulate = 0.1, 0, 1
    optimizer.step()


# ------------------------------ data


def loader():
    return DataLoader(TensorDataset(torch.arange(4.0)), batch_size=2)


@pytest.mark.parametrize(
    "data",
    [(loader(), loader()), [loader()], (TensorDataset(torch.arange(4.0)),), (iter([1]), iter([2]))],
    ids=["two loaders", "one in a list", "a data set", "iterators"],
)
def test_a_sequence_of_loaders_is_refused(data):
    net = nn.Linear(1, 1)
    with pytest.raises(
        mlo.ProblemError, match=r"each be taken for one batch.*zip\(first, second\)"
    ):
        mlo.Problem(
            "n",
            module=net,
            optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
            loss=lambda n, b: n.weight.sum(),
            data=data,
        )


# ------------------------------ complex numbers


MATRIX = torch.complex(
    torch.linspace(-1, 1, 9).double().reshape(3, 3),
    torch.linspace(0.5, -2, 9).double().reshape(3, 3),
)


def complex_loss(w, x):
    return (MATRIX @ w - x).abs().square().sum() + 0.1 * (w.abs() ** 4).sum()


def complex_pair(engine, **options):
    w = nn.ParameterDict({"w": torch.complex(torch.ones(3), torch.zeros(3) - 0.5).cdouble()})
    x = nn.ParameterDict({"x": torch.tensor([0.7, 0.2, 0.3]).double()})
    problems = [
        mlo.Problem(
            "w",
            module=w,
            optimizer=torch.optim.SGD(w.parameters(), lr=0.05, **options),
            loss=lambda w, _, *, x: complex_loss(w["w"], x["x"]),
        ),
        mlo.Problem(
            "x",
            module=x,
            optimizer=torch.optim.SGD(x.parameters(), lr=0.0),
            loss=lambda x, _, *, w: (w["w"] - 1).abs().square().sum(),
        ),
    ]
    return mlo.MultilevelOptimizer(problems, engine)


@pytest.mark.parametrize(
    "engine",
    [
        *("cg", "minres", "gmres", "normal_cg", "neumann", "nystrom", "direct", "identity"),
        *("soba", "sid", "penalty", "outer_product"),
    ],
)
def test_complex_parameters_below_a_solver_are_refused(engine):
    with pytest.raises(mlo.EngineError, match=r"'w' is complex.*view_as_real.*'one_step'"):
        complex_pair(engine)


@pytest.mark.parametrize(
    "engine", ["one_step", "darts", {"name": "unroll", "steps": 1}, "zeroth_order"], ids=str
)
def test_complex_parameters_below_a_step_are_exact(engine):
    optimizer = complex_pair(engine, momentum=0.9)
    w = optimizer.problems["w"].parameters["w"].detach().clone().requires_grad_()
    x = optimizer.problems["x"].parameters["x"].detach().clone().requires_grad_()
    (g,) = torch.autograd.grad(complex_loss(w, x), w, create_graph=True)
    (exact,) = torch.autograd.grad((w - 0.05 * g - 1).abs().square().sum(), x)
    optimizer.step()
    assert relative_error(optimizer.gradient("x")["x"], exact) < 1e-8
