"""`zeroth_order`: the response by repeating the optimizer's last steps at perturbed reads."""

from __future__ import annotations

import math
import warnings

import pytest
import torch

import mlo
from mlo.testing import Vector, bilevel_quadratic, identical, relative_error

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.05),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
}


def three_levels(optimizer, engine, *, steps, radius="auto"):
    """x ← w1 ← w2 with curved losses; w2 reads the response of w1 and the value of x."""
    w1, w2, x = (
        Vector(torch.linspace(*ends, 3, dtype=torch.float64))
        for ends in ((-0.5, 0.8), (0.9, -0.2), (0.2, 0.6))
    )

    def w1_loss(w1, batch, *, x):
        return (batch * torch.cosh(w1.v - x.v)).sum() + (w1.v * x.v.roll(1)).sin().sum()

    def w2_loss(w2, batch, *, w1, x):
        noise = 0.1 * torch.randn(3, dtype=torch.float64)
        return ((w2.v - w1.v.tanh()) ** 2 * x.v.exp() * batch).sum() + (noise * w2.v * x.v).sum()

    def x_loss(x, _, *, w2):
        return (w2.v.sin() * x.v).sum()

    batches = [torch.tensor([1.0, 0.5, 0.8]).double() * k for k in (0.7, 1.0, 1.2)]
    problems = [
        mlo.Problem(
            "w1",
            module=w1,
            optimizer=OPTIMIZERS[optimizer](w1.parameters()),
            loss=w1_loss,
            data=batches,
        ),
        mlo.Problem(
            "w2",
            module=w2,
            optimizer=OPTIMIZERS[optimizer](w2.parameters()),
            loss=w2_loss,
            data=batches,
            steps=steps,
            grad_clip=0.5,
        ),
        mlo.Problem("x", module=x, optimizer=torch.optim.SGD(x.parameters(), lr=0.1), loss=x_loss),
    ]
    return mlo.MultilevelOptimizer(problems, {"default": "one_step", "w2": engine})


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("steps", "recorded"), [(1, 1), (3, 3), (2, 4)])
def test_along_a_basis_it_is_the_unrolled_derivative(optimizer, steps, recorded):
    """Momentum, clipping, noise, and the responses of w1 at several times included."""
    torch.manual_seed(0)
    exact = three_levels(optimizer, mlo.Unroll(steps=recorded), steps=steps)
    list(exact.run(3))
    torch.manual_seed(0)
    engine = mlo.ZerothOrder(samples=50, steps=recorded)
    found = three_levels(optimizer, engine, steps=steps)
    list(found.run(3))
    assert relative_error(found.gradient("x")["v"], exact.gradient("x")["v"]) < 1e-7
    for name in ("w1", "w2", "x"):
        ours, theirs = (o.problems[name].parameters["v"] for o in (found, exact))
        assert relative_error(ours.detach(), theirs.detach()) < 1e-7


@pytest.mark.parametrize("recorded", [1, 2])
def test_settings_and_what_follows_a_step_are_displaced_too(recorded):
    """The learning rate and a threshold after the step are functions of x, and the loss is too."""

    def make(engine):
        w, x = Vector(torch.linspace(-0.9, 0.8, 3).double()), Vector(torch.ones(3).double() / 3)

        def shrunk(parameters, *, x):
            v = parameters["v"]
            return {"v": v.sign() * (v.abs() - 0.1 * x.v[1].exp()).clamp(min=0.0)}

        problems = [
            mlo.Problem(
                "w",
                module=w,
                optimizer=torch.optim.SGD(w.parameters(), lr=0.1, momentum=0.5),
                loss=lambda w, _, *, x: torch.cosh(w.v - x.v).sum(),
                settings=lambda *, x: {"lr": 0.1 * x.v[0].exp()},
                after_step=shrunk,
                steps=recorded,
            ),
            mlo.Problem(
                "x",
                module=x,
                optimizer=torch.optim.SGD(x.parameters(), lr=0.1),
                loss=lambda x, _, *, w: w.v.sin().sum() + w.v.pow(2).sum(),
            ),
        ]
        optimizer = mlo.MultilevelOptimizer(problems, engine)
        optimizer.step()
        return optimizer.gradient("x")["v"]

    found = make(mlo.ZerothOrder(samples=3, steps=recorded))
    assert relative_error(found, make(mlo.Unroll(steps=recorded))) < 1e-7


def squared_errors(engine, solves):
    """E‖ĝ − g‖² / ‖g‖² of the implicit term g of a linear response, over solves of one run."""
    problem = bilevel_quadratic()
    for member in problem.problems:
        for group in member.optimizers[member.name].param_groups:
            group["lr"] = 0.1 if member.name == "w" else 0.0
    direct = 0.1 * problem.value("x")
    exact = problem.swept(lambda jacobian, v: 0.1 * v) - direct
    optimizer = problem.optimizer(engine)
    errors = []
    for _ in range(solves):
        errors.append(relative_error(optimizer.gradient("x")["v"] - direct, exact) ** 2)
        optimizer.step()
    return errors


@pytest.mark.parametrize(
    ("directions", "samples", "variance"),
    [
        ("gaussian", 1, 4.0),
        ("gaussian", 4, 1.0),
        ("orthogonal", 1, 2.0),
        ("orthogonal", 2, 0.5),
        ("orthogonal", 3, 0.0),
        ("orthogonal", 4, 0.0),
    ],
)
def test_the_variance_is_that_of_the_formula(directions, samples, variance):
    """(d + 1) / S for Gaussian directions, d/S − 1 for orthogonal ones, with d = 3."""
    engine = mlo.ZerothOrder(samples=samples, directions=directions, radius=0.1)
    errors = squared_errors(engine, solves=200 if variance else 2)
    mean = sum(errors) / len(errors)
    assert mean == pytest.approx(variance, rel=0.25, abs=1e-12)


def stairs(engine):
    """A lower loss that reads x through a staircase, of which autograd knows nothing."""
    w, x = Vector(torch.zeros(1).double()), Vector(torch.tensor([0.3]).double())

    def loss(w, _, *, x):
        height = torch.floor(4.0 * x.v.detach()) / 4.0
        return 0.5 * (w.v - height).pow(2).sum()

    problems = [
        mlo.Problem("w", module=w, optimizer=torch.optim.SGD(w.parameters(), lr=0.5), loss=loss),
        mlo.Problem(
            "x",
            module=x,
            optimizer=torch.optim.SGD(x.parameters(), lr=0.0),
            loss=lambda x, _, *, w: 3.0 * w.v.sum(),
        ),
    ]
    return mlo.MultilevelOptimizer(problems, engine)


def test_through_a_staircase_it_is_the_smoothed_gradient():
    """φ(x) = 3 (w − ½ (w − s(x))), and E s(x + r u) has a Gaussian bump at each stair."""
    r, x = 0.2, 0.3
    engine = mlo.ZerothOrder(samples=1000, radius=r, directions="gaussian")
    found = float(stairs(engine).gradient("x")["v"])
    bumps = [math.exp(-0.5 * ((k / 4 - x) / r) ** 2) for k in range(-20, 20)]
    exact = 1.5 * 0.25 * sum(bumps) / (r * math.sqrt(2 * math.pi))
    assert found == pytest.approx(exact, rel=0.1)


def test_directions_repeat_when_asked_and_change_at_each_solve():
    engine = mlo.ZerothOrder(samples=1)
    optimizer, other = (bilevel_quadratic().optimizer(engine) for _ in range(2))
    first = optimizer.gradient("x")
    assert identical(first, optimizer.gradient("x"))
    list(optimizer.run(2))
    # A resumed run has the directions of the run that it resumes, whatever random numbers are next.
    torch.manual_seed(1)
    other.load_state_dict(optimizer.state_dict())
    list(optimizer.run(2))
    torch.manual_seed(2)
    list(other.run(2))
    assert identical(optimizer.gradient("x"), other.gradient("x"))
    assert len(set(squared_errors(engine, solves=5))) == 5


def test_other_directions_are_refused():
    with pytest.raises(mlo.EngineError, match=r"directions must be one of.*'gaussian'"):
        mlo.ZerothOrder(directions="gausian")


def test_complex_reads_are_refused():
    w = Vector(torch.zeros(2).double())
    x = torch.nn.ParameterDict({"x": torch.zeros(2).cdouble() + 1j})
    problems = [
        mlo.Problem(
            "w",
            module=w,
            optimizer=torch.optim.SGD(w.parameters(), lr=0.1),
            loss=lambda w, _, *, x: (w.v - x["x"].abs()).pow(2).sum(),
        ),
        mlo.Problem(
            "x",
            module=x,
            optimizer=torch.optim.SGD(x.parameters(), lr=0.1),
            loss=lambda x, _, *, w: w.v.sum() + x["x"].abs().sum(),
        ),
    ]
    with pytest.raises(mlo.EngineError, match="view_as_real"):
        mlo.MultilevelOptimizer(problems, "zeroth_order").step()


@pytest.mark.parametrize("directions", ["orthogonal", "gaussian"])
def test_its_report_counts_the_steps_that_it_makes(directions):
    """Blocks of orthogonal directions are whole, and there may be fewer steps than it may keep."""
    w, x = Vector(torch.zeros(1)), Vector(torch.ones(10))
    calls = []

    def w_loss(w, _, *, x):
        calls.append(1)
        return (w.v - x.v.sum()).square().sum()

    lower = mlo.Problem(
        "w", module=w, optimizer=torch.optim.SGD(w.parameters(), lr=0.1), loss=w_loss, steps=2
    )
    upper = mlo.Problem(
        "x",
        module=x,
        optimizer=torch.optim.SGD(x.parameters(), lr=0.0),
        loss=lambda x, _, *, w: w.v.sum(),
    )
    engine = mlo.ZerothOrder(samples=15, steps=4, directions=directions)
    optimizer = mlo.MultilevelOptimizer([lower, upper], engine)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # (of four steps two are there)
        optimizer.step()
        for _ in range(4):
            optimizer.gradient("x")  # with the checks of the first, second and fourth time
        calls.clear()
        report = optimizer.gradient("x", report=True).reports[0]
    assert report.iterations == len(calls)
    assert report.iterations % (2 * (20 if directions == "orthogonal" else 15)) == 0
