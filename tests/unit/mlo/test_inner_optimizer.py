"""Optimizers that hold another one, and a run of which they make the steps."""

from __future__ import annotations

import pytest
import torch
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR

import mlo
from mlo.inner_optimizer import innermost, layers_of
from mlo.optimizer_traits import decays_outside_gradient
from mlo.testing import Vector, identical


class Prepared(Optimizer):
    """Passes everything on, as Accelerate's optimizer does, and has no hooks of its own."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.state)
    defaults = property(lambda self: self.optimizer.defaults)

    def step(self, closure=None):
        return self.optimizer.step(closure)

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, state):
        self.optimizer.load_state_dict(state)


class Unlike(Prepared):
    """Has settings of its own, and none of those of the optimizer inside."""

    defaults = property(lambda self: {})


class Named:
    """Takes the class of what it holds, as Lightning Fabric's optimizer does."""

    def __init__(self, optimizer):
        self._optimizer = optimizer
        own, held = type(self), type(optimizer)
        self.__class__ = type("Named" + held.__name__, (own, held), {"__module__": __name__})

    def step(self, closure=None):
        return self._optimizer.step()

    def state_dict(self):
        return self._optimizer.state_dict()

    def load_state_dict(self, state):
        self._optimizer.load_state_dict(state)

    def __getattr__(self, name):
        return getattr(self._optimizer, name)


class Lookahead(Optimizer):
    """Every second step, half of the way from where it was, which it keeps in the state inside."""

    def __init__(self, optimizer):
        self.optimizer, self.param_groups = optimizer, optimizer.param_groups
        self.defaults, self.state = optimizer.defaults, {}
        self._optimizer_step_pre_hooks = self._optimizer_step_post_hooks = {}
        self.made = 0

    @torch.no_grad()
    def step(self, closure=None):
        self.optimizer.step()
        self.made += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.optimizer.state[parameter]
                slow = state.setdefault("slow", parameter.clone())
                if self.made % 2 == 0:
                    parameter.copy_(slow.lerp_(parameter, 0.5))

    def state_dict(self):
        return self.optimizer.state_dict()


WRAPPERS = [lambda held: held, Prepared, Named, lambda held: Prepared(Named(held))]
NAMES = ["bare", "properties", "class", "both"]


def run(wrap, engine, kind=AdamW, scheduler=None, rounds=4, **options):
    """A run of four rounds whose lower optimizer is held by another."""
    w, x = (Vector(torch.linspace(0.5, 2.0, 3).double() + k) for k in range(2))
    held = kind(w.parameters(), **{"lr": 0.05, **options})
    lower = mlo.Problem(
        "w",
        module=w,
        optimizer=wrap(held),
        scheduler=None if scheduler is None else scheduler(held),
        loss=lambda w, batch, *, x: ((w.v - x.v) ** 2 * torch.tensor([1.0, 2.0, 3.0])).sum(),
        steps=2,
    )
    upper = mlo.Problem(
        "x",
        module=x,
        optimizer=SGD(x.parameters(), lr=0.1),
        loss=lambda x, batch, *, w: (w.v**3).sum() + (x.v**2).sum(),
    )
    optimizer = mlo.MultilevelOptimizer([lower, upper], engine)
    for _ in range(rounds):
        optimizer.step()
    return optimizer


def test_the_optimizer_inside_is_the_one_of_the_same_groups():
    held = SGD(Vector(torch.ones(2)).parameters(), lr=0.1)
    other = SGD(Vector(torch.ones(2)).parameters(), lr=0.1)
    assert innermost(held) is held
    outer = Prepared(Named(held))
    assert [type(layer).__name__ for layer in layers_of(outer)] == ["Prepared", "NamedSGD", "SGD"]
    outer.optimizer._optimizer = other
    assert innermost(outer) is other
    # Others that it refers to, before it is asked for the one inside, are not inside.
    more = SGD(Vector(torch.ones(2)).parameters(), lr=0.1)
    more.param_groups.insert(0, other.param_groups[0])
    outer = Prepared(other)
    outer.__dict__ = {"own": outer, "before": held, "more": more, **vars(outer)}
    assert innermost(outer) is other


@pytest.mark.parametrize("engine", ["one_step", {"name": "unroll", "steps": 2}, "darts", "direct"])
@pytest.mark.parametrize("wrap", WRAPPERS[1:], ids=NAMES[1:])
@pytest.mark.filterwarnings("ignore:.*decoupled weight decay")
def test_a_run_is_that_of_the_optimizer_inside(wrap, engine):
    ours, plain = run(wrap, engine), run(WRAPPERS[0], engine)
    assert identical(
        ours.problems["w"].module.state_dict(), plain.problems["w"].module.state_dict()
    )
    assert identical(
        ours.problems["x"].module.state_dict(), plain.problems["x"].module.state_dict()
    )


@pytest.mark.parametrize("engine", ["one_step", "darts"])
def test_a_step_is_as_differentiable_as_the_one_inside(engine):
    """Without the option, and with it, where a plain step must be made without it."""
    for options in ({}, {"differentiable": True}):
        ours, plain = (run(wrap, engine, Adam, **options) for wrap in (Unlike, WRAPPERS[0]))
        for name, problem in plain.problems.items():
            found = ours.problems[name].module.state_dict()
            assert identical(problem.module.state_dict(), found)


@pytest.mark.parametrize("wrap", WRAPPERS, ids=NAMES)
def test_weight_decay_is_that_of_the_optimizer_inside(wrap):
    for kind, expected in ((AdamW, True), (Adam, False)):
        outer = wrap(kind(Vector(torch.ones(2)).parameters(), lr=0.1, weight_decay=0.1))
        assert decays_outside_gradient(outer, outer.param_groups[0]) is expected


@pytest.mark.parametrize("wrap", WRAPPERS, ids=NAMES)
def test_a_run_resumes_with_an_optimizer_that_holds_another(wrap):
    whole, half = run(wrap, "one_step"), run(wrap, "one_step", rounds=2)
    resumed = run(wrap, "one_step", rounds=0)
    resumed.load_state_dict(half.state_dict())
    list(resumed.run(2))
    for name, problem in whole.problems.items():
        ours = resumed.problems[name].module.state_dict()
        assert identical(problem.module.state_dict(), ours)


@pytest.mark.filterwarnings("ignore:Engine 'direct' did not converge")
def test_what_an_outer_optimizer_adds_is_no_part_of_a_derivative():
    with pytest.raises(mlo.ProblemError, match="than the step of SGD, which it holds, would"):
        run(Lookahead, "one_step", kind=SGD)
    # Where no step is differentiated it is a training like any other, trial steps included.
    ours = run(Lookahead, "direct", kind=SGD, rounds=1, weight_decay=0.1).problems["w"].module.v
    w = Vector(torch.linspace(0.5, 2.0, 3).double())
    optimizer = Lookahead(SGD(w.parameters(), lr=0.05, weight_decay=0.1))
    for _ in range(2):
        optimizer.optimizer.zero_grad()
        x = torch.linspace(0.5, 2.0, 3).double() + 1
        ((w.v - x) ** 2 * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
        optimizer.step()
    assert torch.equal(ours, w.v)


def test_a_scheduler_may_drive_the_optimizer_inside():
    optimizer = run(Prepared, "one_step", scheduler=lambda held: StepLR(held, 1, 0.5), rounds=1)
    assert optimizer.problems["w"].optimizers["w"].param_groups[0]["lr"] == 0.05 / 4
    # The other way round, and with names, which must belong together.
    w = Vector(torch.ones(2))
    held = SGD(w.parameters(), lr=0.1)
    outer = Prepared(held)
    scheduler = StepLR(held, 1, 0.5)
    for inside, driven in ((held, outer), (outer, held), (outer, outer)):
        scheduler.optimizer = driven
        for names in (inside, scheduler), ({"a": inside}, {"a": scheduler}):
            mlo.Problem(
                "w", module=w, loss=lambda w, _: w.v.sum(), optimizer=names[0], scheduler=names[1]
            )


def test_a_restart_empties_the_state_inside():
    start, task = Vector(torch.ones(2)), Vector(torch.zeros(2))
    held = SGD(task.parameters(), lr=0.1, momentum=0.9)
    lower = mlo.Problem(
        "task",
        module=task,
        optimizer=Lookahead(held),
        loss=lambda task, batch: (task.v**2).sum(),
        restart_from="start",
    )
    upper = mlo.Problem(
        "start",
        module=start,
        optimizer=SGD(start.parameters(), lr=0.0),
        loss=lambda start, batch, *, task: (task.v**2).sum(),
    )
    for _ in mlo.MultilevelOptimizer([lower, upper], "first_order").run(3):
        # One step of SGD from 1, with a momentum that has begun anew.
        assert torch.equal(held.state[task.v]["momentum_buffer"], 2 * torch.ones(2))
