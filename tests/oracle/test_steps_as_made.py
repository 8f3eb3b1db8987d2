"""The step that is differentiated is the step that was made: exact, refused or warned of.

The oracle is plain autograd through the algorithm: one step of the lower optimizer as a formula of
its gradient, then the upper loss.
"""

from __future__ import annotations

import pytest
import torch

import mlo
from mlo.testing import Vector, relative_error

LR = 0.1


def lower_loss(w, x):
    return ((w - x * torch.tensor([1.0, -2.0, 0.5]).double()) ** 2).sum() + 0.1 * (w**4).sum()


def make(engine="one_step", *, sgd=torch.optim.SGD, module=None, **options):
    """w starts at (0.3, 0.2, −0.4) and follows x; x is judged by |w − 1|²."""
    w = module or Vector(torch.tensor([0.3, 0.2, -0.4]).double())
    x = Vector(torch.tensor([0.7, 0.6, 0.9]).double())
    lower = mlo.Problem(
        "w",
        module=w,
        optimizer=sgd(w.parameters(), lr=LR),
        loss=lambda w, _, *, x: lower_loss(w.v, x.v),
        **options,
    )
    upper = mlo.Problem(
        "x",
        module=x,
        optimizer=torch.optim.SGD(x.parameters(), lr=0.0),
        loss=lambda x, _, *, w: ((w.v - 1.0) ** 2).sum(),
    )
    return mlo.MultilevelOptimizer([lower, upper], engine), w, x


def oracle(step):
    """The total gradient where `step(w, g)` is the lower optimizer's step."""
    w = torch.tensor([0.3, 0.2, -0.4]).double().requires_grad_()
    x = torch.tensor([0.7, 0.6, 0.9]).double().requires_grad_()
    (g,) = torch.autograd.grad(lower_loss(w, x), w, create_graph=True)
    (found,) = torch.autograd.grad(((step(w, g) - 1.0) ** 2).sum(), x)
    return found


# ------------------------------ hooks on parameters


@pytest.mark.parametrize(
    "hook",
    [
        lambda g: g / 107,
        lambda g: g.clamp(-0.1, 0.1),
        lambda g: g.mul_(0.5),
        lambda g: torch.where(g > 0, g, 0.0),
    ],
    ids=["scaled", "clamped", "in place", "masked"],
)
def test_a_hook_that_changes_a_gradient_is_refused(hook):
    for engine in ("one_step", "darts", {"name": "unroll", "steps": 2}):
        optimizer, w, _ = make(engine)
        w.v.register_hook(hook)
        with pytest.raises(
            mlo.ProblemError, match=r"hook on parameter 'v' of problem 'w'.*neumann"
        ):
            optimizer.gradient("x")
        with pytest.raises(mlo.ProblemError, match=r"hook on parameter 'v'"):
            optimizer.step()


def test_a_hook_that_begins_to_act_later_is_refused_then():
    optimizer, w, _ = make()
    optimizer.step()
    w.v.register_hook(lambda g: g * 2)
    with pytest.raises(mlo.ProblemError, match="hook on parameter 'v'"):
        optimizer.step()


@pytest.mark.parametrize(
    "engine",
    [*({"name": "one_step", "keep_graph": keep} for keep in (False, True)), "darts"],
    ids=str,
)
def test_a_hook_that_only_looks_is_shown_every_gradient(engine):
    seen = []
    plain, *_ = make(engine)
    optimizer, w, _ = make(engine)
    w.v.register_hook(lambda g: seen.append(g.clone()))
    expected = optimizer.gradient("w")["v"]
    seen.clear()
    optimizer.step(), plain.step()
    assert len(seen) == 1 and torch.equal(seen[0], expected)
    assert torch.equal(optimizer.gradient("x")["v"], plain.gradient("x")["v"])
    assert relative_error(plain.gradient("x")["v"], oracle(lambda w, g: w - LR * g)) < 1e-8


def test_a_hook_under_an_implicit_engine_is_warned_of():
    optimizer, w, _ = make("cg")
    start = float(w.v[0])
    w.v.register_hook(lambda g: g * torch.tensor([0.0, 1.0, 1.0]).double())
    with pytest.warns(mlo.SolveWarning, match="knows nothing of the hook"):
        optimizer.step()
    assert float(w.v[0]) == start  # the hook acts on the value as it always did


def test_a_post_accumulate_hook_would_never_be_called():
    w = Vector(torch.zeros(3).double())
    w.v.register_post_accumulate_grad_hook(lambda p: p.grad.clamp_(-1, 1))
    with pytest.raises(mlo.ProblemError, match=r"would never be called.*before_update"):
        make(module=w)


# ------------------------------ hooks of the optimizer


def clamp(optimizer, args, kwargs):
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.data.clamp_(-0.1, 0.35)


@pytest.mark.parametrize("pre", [True, False])
def test_an_optimizer_hook_that_moves_parameters_is_refused(pre):
    optimizer, *_ = make()
    sgd = optimizer.problems["w"].optimizers["w"]
    (sgd.register_step_pre_hook if pre else sgd.register_step_post_hook)(clamp)
    with pytest.raises(mlo.ProblemError, match=r"moved 'v' to another place.*without the hooks"):
        optimizer.step()


def test_an_optimizer_hook_may_begin_to_act_at_any_time():
    """A projection does nothing as long as the parameters are inside."""
    optimizer, w, _ = make()
    optimizer.problems["w"].optimizers["w"].register_step_post_hook(
        lambda sgd, args, kwargs: w.v.data.clamp_(max=0.5)
    )
    with pytest.raises(mlo.ProblemError, match="moved 'v' to another place"):
        list(optimizer.run(30))
    assert optimizer.round > 1


def test_optimizer_hooks_that_only_look_stay_allowed():
    seen = []
    optimizer, *_ = make()
    plain, *_ = make()
    sgd = optimizer.problems["w"].optimizers["w"]
    sgd.register_step_pre_hook(lambda *_: seen.append("pre"))
    sgd.register_step_post_hook(lambda *_: seen.append("post"))
    torch.optim.lr_scheduler.StepLR(sgd, 2)  # wraps `step` as well
    list(optimizer.run(3)), list(plain.run(3))
    assert seen == ["pre", "post"] * 3
    assert torch.equal(optimizer.gradient("x")["v"], plain.gradient("x")["v"])


def test_a_step_put_on_the_object_is_compared():
    optimizer, w, _ = make()
    sgd = optimizer.problems["w"].optimizers["w"]
    original = sgd.step

    def shrinking():
        original()
        w.v.data.mul_(0.9)

    sgd.step = shrinking
    with pytest.raises(mlo.ProblemError, match="moved 'v' to another place"):
        optimizer.step()


# ------------------------------ classes of one's own


class Projected(torch.optim.SGD):
    """Keeps parameters in a box, where autograd does not see it."""

    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.clamp_(-0.35, 0.32)


class ProjectedLater(Projected):
    """Of which the first steps stay inside."""

    def step(self, closure=None):
        torch.optim.SGD.step(self, closure)
        with torch.no_grad():
            for group in self.param_groups:
                for p in group["params"]:
                    p.clamp_(-0.95, 0.6)


class Differentiable(torch.optim.SGD):
    """A box that is part of the step: out of place, and differentiable where that is asked for."""

    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                moved = (p - group["lr"] * p.grad).clamp(-0.35, 0.32)
                if group["differentiable"]:
                    p.copy_(moved)
                else:
                    p.data.copy_(moved)


class ClippedByGroup(torch.optim.SGD):
    """Clips the norm of each group's gradient, all its parameters together."""

    def step(self, closure=None):
        for group in self.param_groups:
            grads = [p.grad for p in group["params"] if p.grad is not None]
            norm = torch.stack([g.norm() for g in grads]).norm()
            scale = torch.clamp(0.5 / norm, max=1.0)
            for p in group["params"]:
                if p.grad is not None:
                    p.grad = p.grad * scale
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        p.add_(p.grad, alpha=-group["lr"])


def test_a_projection_that_autograd_does_not_see_is_refused():
    for engine in ("one_step", {"name": "unroll", "steps": 2}):
        optimizer, *_ = make(engine, sgd=Projected)
        with pytest.raises(mlo.ProblemError, match=r"derivative of a step of Projected.*off by"):
            optimizer.step()


def test_a_projection_that_acts_later_is_refused_then():
    optimizer, *_ = make(sgd=ProjectedLater)
    with pytest.raises(mlo.ProblemError, match="derivative of a step of ProjectedLater"):
        list(optimizer.run(64))
    assert optimizer.round >= 1


def test_a_subclass_differentiable_where_asked_stays_exact():
    """A subclass that is differentiable where it is asked to be stays exact."""
    optimizer, *_ = make(sgd=Differentiable)
    optimizer.step()
    exact = oracle(lambda w, g: (w - LR * g).clamp(-0.35, 0.32))
    assert relative_error(optimizer.gradient("x")["v"], exact) < 1e-12


def test_a_subclass_that_clips_a_group_as_a_whole_is_exact():
    """The upper loss reads one of the two parameters; the other is in the norm all the same."""

    class Two(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Parameter(torch.tensor([0.3, 0.2]).double())
            self.b = torch.nn.Parameter(torch.tensor([-0.4]).double())

    def loss(a, b, x):
        return ((a - x[:2]) ** 2).sum() + ((b - x[2:] ** 2) ** 2).sum() + (a.sum() * b).sum() ** 2

    two, x = Two(), Vector(torch.tensor([2.0, 1.0, 1.5]).double())
    problems = [
        mlo.Problem(
            "w",
            module=two,
            optimizer=ClippedByGroup(two.parameters(), lr=LR),
            loss=lambda w, _, *, x: loss(w.a, w.b, x.v),
        ),
        mlo.Problem(
            "x",
            module=x,
            optimizer=torch.optim.SGD(x.parameters(), lr=0.0),
            loss=lambda x, _, *, w: ((w.a - 1.0) ** 2).sum(),
        ),
    ]
    optimizer = mlo.MultilevelOptimizer(problems, "one_step")
    a, b = (p.detach().clone().requires_grad_() for p in (two.a, two.b))
    start = x.v.detach().clone().requires_grad_()
    grads = torch.autograd.grad(loss(a, b, start), (a, b), create_graph=True)
    norm = torch.stack([g.norm() for g in grads]).norm()
    assert float(norm) > 0.5
    after = a - LR * grads[0] * 0.5 / norm
    (exact,) = torch.autograd.grad(((after - 1.0) ** 2).sum(), start)
    optimizer.step()
    assert torch.allclose(two.a, after)
    assert relative_error(optimizer.gradient("x")["v"], exact) < 1e-10


# ------------------------------ settings


@pytest.mark.parametrize("engine", ["one_step", "cg"])
def test_a_setting_that_requires_a_gradient_is_refused(engine):
    rate = torch.tensor(0.1, requires_grad=True)

    def sgd(parameters, lr):
        return torch.optim.SGD(parameters, lr=rate)

    with pytest.raises(mlo.ProblemError, match=r"optimizer's lr is a tensor that requires"):
        make(engine, sgd=sgd)


def test_a_setting_made_to_require_a_gradient_later_is_refused():
    optimizer, *_ = make()
    optimizer.step()
    group = optimizer.problems["w"].optimizers["w"].param_groups[0]
    group["weight_decay"] = torch.tensor(0.1, requires_grad=True)
    with pytest.raises(mlo.ProblemError, match=r"optimizer's weight_decay is a tensor"):
        optimizer.step()


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_an_optimizer_made_differentiable_by_the_user_works(kind):
    def differentiable(parameters, lr):
        return kind(parameters, lr=lr, differentiable=True)

    ours, *_ = make(sgd=differentiable)
    plain, *_ = make(sgd=kind)
    list(ours.run(2)), list(plain.run(2))
    assert relative_error(ours.gradient("x")["v"], plain.gradient("x")["v"]) < 1e-12
    assert ours.problems["w"].optimizers["w"].defaults["differentiable"] is True
