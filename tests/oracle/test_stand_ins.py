"""What a loss sees of a parameter it sees of the tensor that stands for it too; or is refused."""

from __future__ import annotations

import warnings

import pytest
import torch
from penalised_fit import lower, upper
from torch import nn

import mlo
from mlo.testing import relative_error

ENGINES = ["one_step", {"name": "one_step", "keep_graph": False}, {"name": "unroll", "steps": 1}]
STEPS = 4


class Marked(nn.Parameter):
    """A class of parameters with a method."""

    def penalty(self):
        return self.square().sum()


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = Marked(torch.ones(2, dtype=torch.float64))
        self.b = nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.b.no_decay = True
        self.teacher = nn.Parameter(torch.zeros(4, dtype=torch.float64), requires_grad=False)

    def forward(self):
        return torch.cat([self.a, self.b])


def make(engine, penalty, *, optimizer=torch.optim.SGD, of_upper=None, **options):
    net, h = Net(), nn.ParameterDict({"x": torch.tensor(-1.0, dtype=torch.float64)})
    fit = optimizer([net.a, net.b], lr=0.01)
    penalty = penalty(net, fit)
    of_upper = None if of_upper is None else of_upper(net, fit)
    problems = [
        mlo.Problem(
            "net",
            module=net,
            optimizer=fit,
            loss=lambda net, _, *, h: lower(net(), h["x"], penalty(net)),
            **options,
        ),
        mlo.Problem(
            "h",
            module=h,
            optimizer=torch.optim.SGD(h.parameters(), lr=0.0),
            loss=lambda h, _, *, net: (
                upper(net(), h["x"]) + (0.0 if of_upper is None else of_upper(net))
            ),
        ),
    ]
    return mlo.MultilevelOptimizer(problems, engine), net


def squares(parameters):
    return sum(p.square().sum() for p in parameters)


def by_hand(penalty, *, after=lambda w, t: t):
    """θ and the gradient in x, through the last of the steps, with a teacher that moves."""
    x = torch.tensor(-1.0, dtype=torch.float64, requires_grad=True)
    theta, teacher = torch.ones(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for _ in range(STEPS):
        theta = theta.detach().requires_grad_()
        loss = lower(theta, x, penalty(theta, teacher))
        (g,) = torch.autograd.grad(loss, theta, create_graph=True)
        theta = theta - 0.01 * g
        teacher = after(theta.detach(), teacher)
    return theta.detach(), torch.autograd.grad(upper(theta, x), x)[0]


TOLD_BY_WHAT_IS_COPIED = {
    "attribute": lambda net, _: (
        lambda net: squares(p for p in (net.a, net.b) if not getattr(p, "no_decay", False))
    ),
    "class": lambda net, _: (
        lambda net: squares(p for p in net.parameters() if isinstance(p, Marked))
    ),
    "method": lambda net, _: lambda net: net.a.penalty(),
}


@pytest.mark.parametrize("told", TOLD_BY_WHAT_IS_COPIED)
@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_attributes_and_classes_are_those_of_parameters(told, engine):
    optimizer, net = make(engine, TOLD_BY_WHAT_IS_COPIED[told])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(optimizer.run(STEPS))
    theta, expected = by_hand(lambda w, _: w[:2].square().sum())
    assert relative_error(net(), theta) < 1e-12
    assert relative_error(optimizer.gradient("h")["x"], expected) < 1e-9


def by_id(net, _):
    without = {id(net.b)}
    return lambda net: squares(p for p in (net.a, net.b) if id(p) not in without)


def by_dict(net, _):
    fisher = {net.a: 1.0}
    return lambda net: squares(p for p in net.parameters() if p in fisher)


def by_object(net, _):
    chosen = net.a
    return lambda net: squares(p for p in net.parameters() if p is chosen)


TOLD_BY_IDENTITY = [by_id, by_dict, by_object]


@pytest.mark.parametrize("told", TOLD_BY_IDENTITY)
@pytest.mark.parametrize("engine", [*ENGINES, "cg", "darts"], ids=str)
def test_parameters_told_by_identity_are_refused(told, engine):
    optimizer, net = make(engine, told)
    with pytest.raises(
        mlo.ProblemError, match=r"'net' is .* It tells parameters by their identity"
    ):
        optimizer.step()
    assert torch.equal(net(), torch.ones(4, dtype=torch.float64))


def by_requires_grad(net, _):
    return lambda net: squares(p for p in (net.a, net.b) if p.requires_grad)


@pytest.mark.parametrize(
    ("engine", "told"),
    [*[("one_step", told) for told in TOLD_BY_IDENTITY], ("first_order", by_requires_grad)],
)
def test_what_is_read_and_told_by_identity_is_warned_of(engine, told):
    """Once: a loss that is not evaluated again may keep state, which more calls would move."""
    optimizer, _ = make(engine, lambda *_: lambda net: net.a.sum(), of_upper=told)
    with pytest.warns(mlo.SolveWarning, match=r"'h' is .* which tensor objects it gets") as seen:
        list(optimizer.run(STEPS))
    assert sum("which tensor objects" in str(warning.message) for warning in seen) == 1


def test_identity_is_allowed_where_nothing_stands_in():
    optimizer, net = make("first_order", by_id)
    list(optimizer.run(STEPS))
    assert relative_error(net(), by_hand(lambda w, _: w[:2].square().sum())[0]) < 1e-12


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_a_state_looked_up_by_parameters_is_refused(engine):
    """And the state, to which a look-up adds entries, can be saved."""
    optimizer, _ = make(
        engine,
        lambda net, fit: lambda net: sum(len(fit.state[p]) for p in (net.a, net.b)) + net.a.sum(),
        optimizer=torch.optim.Adam,
    )
    with pytest.raises(mlo.ProblemError, match=r"'net' looks up optimizer\.state by parameters"):
        optimizer.step()
    optimizer.state_dict()


# ------------------------------ frozen parameters that the user moves


@pytest.mark.parametrize("engine", ENGINES, ids=str)
@pytest.mark.parametrize("when", ["in the loss", "after the update"])
def test_a_frozen_teacher_is_as_it_was_at_the_step(when, engine):
    """By `.data` too, which PyTorch counts as no change of the tensor."""

    def move(net):
        net.teacher.data.mul_(0.5).add_(0.5 * net().detach())

    def penalty(net):
        distance = (net() - net.teacher.clone()).square().sum()
        if when == "in the loss":
            move(net)
        return distance

    hook = {"after_update": lambda _: move(net)} if when == "after the update" else {}
    optimizer, net = make(engine, lambda *_: penalty, **hook)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        list(optimizer.run(STEPS))
    moved_by = {"in the loss": [], "after the update": None}[when]

    def after(w, teacher):
        if moved_by is not None:  # the loss has moved it by the parameters before the step
            moved_by.append(w)
            w = torch.ones_like(w) if len(moved_by) == 1 else moved_by[-2]
        return 0.5 * teacher + 0.5 * w

    theta, expected = by_hand(lambda w, t: (w - t).square().sum(), after=after)
    assert relative_error(net(), theta) < 1e-12
    assert relative_error(optimizer.gradient("h")["x"], expected) < 1e-9


def test_a_large_frozen_backbone_is_not_copied():
    class Large(Net):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Parameter(torch.zeros(1 << 17).double(), requires_grad=False)

    h = nn.ParameterDict({"x": torch.tensor(-1.0, dtype=torch.float64)})
    recorded = {}
    for kind in (Net, Large):
        net = kind()
        optimizer = mlo.MultilevelOptimizer(
            [
                mlo.Problem(
                    "net",
                    module=net,
                    optimizer=torch.optim.SGD([net.a, net.b], lr=0.01),
                    loss=lambda net, _, *, h: lower(net(), h["x"], 0.0),
                ),
                mlo.Problem(
                    "h",
                    module=h,
                    optimizer=torch.optim.SGD(h.parameters(), lr=0.0),
                    loss=lambda h, _, *, net: upper(net(), h["x"]),
                ),
            ]
        )
        optimizer.step()
        recorded[kind] = set(optimizer._history.last["net"].buffers["net"])
    assert recorded == {Net: {"teacher"}, Large: set()}
