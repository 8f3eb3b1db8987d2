"""Implicit derivatives of solutions with `after_step`, against solutions that are solved again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from sklearn.datasets import load_diabetes
from sklearn.linear_model import ElasticNet
from torch import Tensor

import mlo
from mlo import constraints
from mlo.testing import Vector, relative_error

ENGINES = {
    "cg": {"name": "cg", "tol": 1e-13, "max_steps": 200},
    "minres": {"name": "minres", "tol": 1e-13, "max_steps": 200},
    "gmres": {"name": "gmres", "tol": 1e-13, "max_steps": 200},
    "direct": "direct",
    "neumann": {"name": "neumann", "num_terms": 600, "tol": 1e-6},
}
H = torch.tensor(
    [[2.0, 0.5, 0.0, 0.3], [0.5, 1.5, 0.2, 0.0], [0.0, 0.2, 1.0, 0.1], [0.3, 0.0, 0.1, 1.2]],
    dtype=torch.float64,
)
B = torch.tensor([[1.0, 0.3], [-0.8, 0.4], [0.2, -1.0], [-0.5, -0.7]], dtype=torch.float64)
RATE = 0.3


def quadratic(after_step, engine, *, dtype=torch.float64, steps=400, clip=None, **options):
    """min ½ wᵀHw − wᵀBx where `after_step` says, below max wᵀ(1, 2, 3, 4)."""
    w, x = Vector(torch.full((4,), 0.2, dtype=dtype)), Vector(torch.tensor([0.9, 0.4], dtype=dtype))
    h, b = H.to(dtype), B.to(dtype)
    lower = mlo.Problem(
        "w",
        module=w,
        optimizer=torch.optim.SGD(w.parameters(), **{"lr": RATE} | options),
        grad_clip=clip,
        loss=lambda w, _, *, x: 0.5 * w.v @ h @ w.v - w.v @ (b @ x.v),
        steps=steps,
        after_step=after_step,
    )
    upper = mlo.Problem(
        "x",
        module=x,
        optimizer=torch.optim.SGD(x.parameters(), lr=0.0),
        loss=lambda x, _, *, w: (w.v * torch.arange(1.0, 5.0, dtype=dtype)).sin().sum(),
    )
    return w, x, mlo.MultilevelOptimizer([lower, upper], engine)


def solved_again(after_step, x, decay=0.0, clip=None, steps=400):
    """The upper loss at the solution, by plain projected descent; and what the solution is."""
    w = torch.full((4,), 0.2, dtype=torch.float64)
    module = Vector(x)
    for _ in range(steps):
        g = H @ w - B @ x
        if clip is not None:
            g = g * torch.clamp(clip / (g.norm() + 1e-6), max=1.0)
        w = w - RATE * (g + decay * w)
        w = after_step({"v": w}, module)["v"].detach()
    return (w * torch.arange(1.0, 5.0, dtype=torch.float64)).sin().sum(), w


def differences(after_step, x, **options):
    found = []
    for i in range(len(x)):
        e = torch.zeros_like(x)
        e[i] = 1e-6
        up, down = (solved_again(after_step, x + s * e, **options)[0] for s in (1, -1))
        found.append((up - down) / 2e-6)
    return torch.stack(found)


def jacobian_of(project, w, x):
    at = w.detach() - RATE * (H @ w.detach() - B @ x.v.detach())
    return torch.autograd.functional.jacobian(lambda v: project({"v": v}, x)["v"], at)


# Each as a function of the parameters and x's module.
PROJECTIONS = {
    "nonnegative": lambda p, x: constraints.nonnegative(p),
    "box with a bound of x": lambda p, x: {"v": constraints.box(p["v"], -0.3 * x.v[0], 0.4)},
    "simplex with a total of x": lambda p, x: {"v": constraints.simplex(p["v"], x.v.sum())},
    "soft threshold of x": lambda p, x: {
        "v": constraints.soft_threshold(p["v"], RATE * 0.5 * x.v[1].exp())
    },
}
CURVED = {"ball with a radius of x": lambda p, x: {"v": constraints.l2_ball(p["v"], 0.3 * x.v[0])}}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("projection", PROJECTIONS)
def test_engines_differentiate_projected_solutions(projection, engine):
    project = PROJECTIONS[projection]
    w, x, optimizer = quadratic(lambda p, *, x: project(p, x), ENGINES[engine])
    optimizer.step()
    expected_w = solved_again(project, x.v.detach())[1]
    torch.testing.assert_close(w.v.detach(), expected_w, atol=1e-12, rtol=0)
    free = project({"v": w.v - RATE * (H @ w.v - B @ x.v)}, x)["v"]
    assert 0 < torch.linalg.matrix_rank(jacobian_of(project, w.v, x)) < 4  # some are free
    torch.testing.assert_close(free.detach(), w.v.detach(), atol=1e-12, rtol=0)
    expected = differences(project, x.v.detach())
    assert relative_error(optimizer.gradient("x")["v"], expected) < 1e-6


@pytest.mark.parametrize("engine", ["gmres", "direct", "neumann"])
@pytest.mark.parametrize("projection", CURVED)
def test_a_curved_set_needs_no_symmetry(projection, engine):
    project = CURVED[projection]
    _, x, optimizer = quadratic(lambda p, *, x: project(p, x), ENGINES[engine])
    optimizer.step()
    expected = differences(project, x.v.detach())
    assert relative_error(optimizer.gradient("x")["v"], expected) < 1e-6


@pytest.mark.parametrize("engine", ["cg", "minres", "nystrom"])
def test_symmetric_engines_refuse_a_curved_set(engine):
    project = CURVED["ball with a radius of x"]
    _, _, optimizer = quadratic(lambda p, *, x: project(p, x), engine, steps=50)
    with pytest.raises(mlo.EngineError, match="not an orthogonal projector: use 'gmres'"):
        optimizer.step()


@pytest.mark.parametrize("engine", ["cg", "gmres"])
def test_the_condition_has_the_weight_decay(engine):
    project = PROJECTIONS["nonnegative"]
    w, x, optimizer = quadratic(
        lambda p, *, x: project(p, x), ENGINES[engine], weight_decay=0.3, momentum=0.5
    )
    optimizer.step()
    torch.testing.assert_close(
        w.v.detach(), solved_again(project, x.v.detach(), 0.3)[1], atol=1e-12, rtol=0
    )
    expected = differences(project, x.v.detach(), decay=0.3)
    assert relative_error(optimizer.gradient("x")["v"], expected) < 1e-6


@pytest.mark.parametrize("engine", ["cg", "gmres"])
@pytest.mark.parametrize(
    ("options", "factor"),
    [
        ({"momentum": 0.5}, 2.0),
        ({"momentum": 0.5, "nesterov": True}, 2.0),
        ({"momentum": 0.6, "dampening": 0.4}, 1.5),
    ],
)
def test_a_threshold_acts_against_momentum(engine, options, factor):
    """The buffer rests at (1 − dampening) / (1 − momentum) times the gradient."""

    def shrink(p, x, rate=RATE):
        return {"v": constraints.soft_threshold(p["v"], rate * x.v[1].exp())}

    w, x, optimizer = quadratic(lambda p, *, x: shrink(p, x), ENGINES[engine], **options)
    optimizer.step()

    def alike(p, x):
        return shrink(p, x, RATE / factor)

    expected_w = solved_again(alike, x.v.detach())[1]
    torch.testing.assert_close(w.v.detach(), expected_w, atol=1e-12, rtol=0)
    expected = differences(alike, x.v.detach())
    assert relative_error(optimizer.gradient("x")["v"], expected) < 1e-6


@pytest.mark.parametrize("engine", ["direct", "gmres"])
def test_a_threshold_acts_against_the_clipped_gradient(engine):
    project, clip = PROJECTIONS["soft threshold of x"], 1.1
    _, x, optimizer = quadratic(lambda p, *, x: project(p, x), engine, clip=clip, steps=2000)
    optimizer.step()
    plain = differences(project, x.v.detach())
    expected = differences(project, x.v.detach(), clip=clip, steps=2000)
    assert relative_error(plain, expected) > 0.01  # the clip acts at the solution
    assert relative_error(optimizer.gradient("x")["v"], expected) < 1e-6


@pytest.mark.parametrize("engine", ["cg", "gmres"])
def test_a_solution_that_is_free_nowhere(engine):
    """w is set to (x, x): only what `after_step` reads has a derivative."""
    _, x, optimizer = quadratic(lambda p, *, x: {"v": torch.cat([x.v, x.v])}, engine, steps=2)
    optimizer.step()
    k = torch.arange(1.0, 5.0, dtype=torch.float64)
    expected = k * (k * torch.cat([x.v, x.v]).detach()).cos()
    torch.testing.assert_close(optimizer.gradient("x")["v"], expected[:2] + expected[2:])


def two_rates(engine, rates):
    w = torch.nn.ParameterDict({k: torch.full((2,), 0.2, dtype=torch.float64) for k in "ab"})
    x = Vector(torch.tensor([0.9, 0.4], dtype=torch.float64))
    groups = [{"params": [w[key]], "lr": rate} for key, rate in zip("ab", rates, strict=True)]

    def loss(w, _, *, x):
        v = torch.cat([w["a"], w["b"]])
        return 0.5 * v @ H @ v - v @ (B @ x.v)

    lower = mlo.Problem(
        "w",
        module=w,
        optimizer=torch.optim.SGD(groups, lr=0.1),
        loss=loss,
        steps=400,
        after_step=constraints.nonnegative,
    )
    upper = mlo.Problem(
        "x",
        module=x,
        optimizer=torch.optim.SGD(x.parameters(), lr=0.0),
        loss=lambda x, _, *, w: (torch.cat([w["a"], w["b"]]) * torch.arange(1.0, 5.0)).sin().sum(),
    )
    optimizer = mlo.MultilevelOptimizer([lower, upper], engine)
    optimizer.step()
    return optimizer.gradient("x")["v"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("engine", ["cg", "minres", "gmres"])
def test_each_parameter_may_have_its_learning_rate(engine):
    """On the free variables the system stays symmetric."""
    expected = differences(PROJECTIONS["nonnegative"], torch.tensor([0.9, 0.4]).double())
    assert relative_error(two_rates(ENGINES[engine], (0.3, 0.1)), expected) < 1e-6


def test_damping_on_the_free_variables_knows_no_learning_rate():
    damped = ENGINES["cg"] | {"damping": 0.5}
    torch.testing.assert_close(two_rates(damped, (0.3, 0.3)), two_rates(damped, (0.2, 0.1)))


def test_a_projected_solution_is_differentiated_twice():
    """In the middle of three levels, by cg on the free variables."""

    def upper_loss(w):
        return (w * torch.arange(1.0, 5.0, dtype=torch.float64)).sin().sum()

    w, x = Vector(torch.full((4,), 0.2).double()), Vector(torch.tensor([0.9, 0.4]).double())
    z = Vector(torch.tensor([0.3]).double())
    lowest = mlo.Problem(
        "w",
        module=w,
        optimizer=torch.optim.SGD(w.parameters(), lr=RATE),
        loss=lambda w, _, *, x: 0.5 * w.v @ H @ w.v - w.v @ (B @ x.v.tanh()),
        steps=400,
        after_step=lambda p: constraints.nonnegative(p),
    )
    middle = mlo.Problem(
        "x",
        module=x,
        optimizer=torch.optim.SGD(x.parameters(), lr=0.0),
        loss=lambda x, _, *, w, z: 0.1 * upper_loss(w.v) + ((x.v - z.v) ** 2).sum(),
    )
    top = mlo.Problem(
        "z",
        module=z,
        optimizer=torch.optim.SGD(z.parameters(), lr=0.0),
        loss=lambda z, _, *, x: (x.v**3).sum(),
    )
    optimizer = mlo.MultilevelOptimizer([lowest, middle, top], {"w": ENGINES["cg"], "x": "direct"})
    optimizer.step()

    # d(upper)/dz = -(∂²M/∂x∂z)ᵀ (∂²M/∂x²)⁻ᵀ ∇: with M(x) = 0.1 upper(w*(x)) + ‖x − z‖².
    free = w.v.detach() > 0.0
    assert 0 < int(free.sum()) < 4

    def m(at):
        best = torch.linalg.solve(H[free][:, free], (B @ at.tanh())[free])
        full = torch.zeros(4, dtype=torch.float64).index_put((free,), best)
        return 0.1 * upper_loss(full) + ((at - z.v.detach()) ** 2).sum()

    point = x.v.detach()
    hessian = torch.func.hessian(m)(point)
    mixed = torch.full((2, 1), -2.0, dtype=torch.float64)
    expected = -mixed.T @ torch.linalg.solve(hessian, 3 * point**2)
    assert relative_error(optimizer.gradient("z")["v"], expected) < 1e-8


def test_elastic_net_follows_scikit_learn():
    """The penalties as upper variables; 442 examples, 10 features, an active set of some."""
    data = load_diabetes()
    x = torch.tensor(data.data * 20, dtype=torch.float64)
    y = torch.tensor((data.target - data.target.mean()) / data.target.std(), dtype=torch.float64)
    train, valid = slice(0, 300), slice(300, 442)

    def solve(l1, l2):
        # 1/(2n) ‖Xw − y‖² + alpha r ‖w‖₁ + alpha (1 − r)/2 ‖w‖²
        model = ElasticNet(
            alpha=l1 + l2,
            l1_ratio=l1 / (l1 + l2),
            fit_intercept=False,
            tol=1e-14,
            max_iter=1_000_000,
        ).fit(x[train].numpy(), y[train].numpy())
        return torch.tensor(model.coef_)

    def validate(w):
        return (x[valid] @ w - y[valid]).square().mean()

    rate = 0.5 / float(torch.linalg.eigvalsh(x[train].T @ x[train] / 300).max())
    logs = torch.tensor([-3.0, -4.0], dtype=torch.float64)
    w, penalty = Vector(torch.zeros(10).double()), Vector(logs.clone())

    def proximal(p, *, penalty):
        l1, l2 = penalty.v.exp()
        return {"v": constraints.soft_threshold(p["v"], rate * l1) / (1 + rate * l2)}

    lower = mlo.Problem(
        "w",
        module=w,
        optimizer=torch.optim.SGD(w.parameters(), lr=rate),
        loss=lambda w, _: (x[train] @ w.v - y[train]).square().mean() / 2,
        after_step=proximal,
    )
    upper = mlo.Problem(
        "penalty",
        module=penalty,
        optimizer=torch.optim.SGD(penalty.parameters(), lr=0.0),
        loss=lambda penalty, _, *, w: validate(w.v),
    )
    with torch.no_grad():
        w.v.copy_(solve(*logs.exp().tolist()))
    assert 0 < int((w.v == 0).sum()) < 10
    found = mlo.MultilevelOptimizer([lower, upper], "direct").gradient("penalty")["v"]
    expected = []
    for index in range(2):
        e = torch.zeros(2, dtype=torch.float64)
        e[index] = 1e-4
        up, down = (validate(solve(*(logs + s * e).exp().tolist())) for s in (1, -1))
        expected.append((up - down) / 2e-4)
    assert relative_error(found, torch.stack(expected)) < 1e-5


# ------------------------------ published problems that an active set decides
# Each from the library of Zhou, Zemkoho and Tin, BOLIB (2020), with its best known solution.


@dataclass(frozen=True, kw_only=True)
class Published:
    """min F(x, y) over x in a box, where y minimises f(x, ·) between bounds that x decides."""

    upper: Callable[[Tensor, Tensor], Tensor]
    lower: Callable[[Tensor, Tensor], Tensor]
    bounds: Callable[[Tensor], tuple[Tensor, Tensor]]
    box: tuple[list[float], list[float]]
    start: list[float]
    x: list[float]
    y: list[float]
    value: float
    near: float = 1e-5  # how close descent with a fixed step comes


INFINITE = 1e6
PUBLISHED = {
    "ClarkWesterberg1990a": Published(
        upper=lambda x, y: ((x - 3) ** 2 + (y - 2) ** 2).sum(),
        lower=lambda x, y: ((y - 5) ** 2).sum(),
        bounds=lambda x: (1 + x / 2, torch.minimum(2 * x + 1, 7 - x / 2)),
        box=([0.0], [8.0]),
        start=[1.4],
        x=[1.0],
        y=[3.0],
        value=5.0,
    ),
    "Dempe1992b": Published(
        upper=lambda x, y: ((x - 3.5) ** 2 + (y + 4) ** 2).sum(),
        lower=lambda x, y: ((y - 3) ** 2).sum(),
        bounds=lambda x: (-x.sqrt(), x.sqrt()),
        box=([0.1], [8.0]),
        start=[2.0],
        x=[1.0],
        y=[1.0],
        value=31.25,
        near=0.15,  # where the second derivative vanishes too
    ),
    "LamparielloSagratella2017Ex31": Published(
        upper=lambda x, y: (x**2 + y**2).sum(),
        lower=lambda x, y: y.sum(),
        bounds=lambda x: (1 - x, torch.full_like(x, INFINITE)),
        box=([-1.0], [1.0]),
        start=[-0.5],
        x=[0.5],
        y=[0.5],
        value=0.5,
    ),
    "AiyoshiShimizu1984Ex2": Published(
        upper=lambda x, y: 2 * x.sum() - 3 * y.sum() - 60,
        lower=lambda x, y: ((y - x + 20) ** 2).sum(),
        bounds=lambda x: (torch.full_like(x, -10.0), torch.clamp((x - 10) / 2, max=20.0)),
        box=([0.0, 0.0], [50.0, 50.0]),
        start=[1.0, 28.0],
        x=[0.0, 30.0],
        y=[-10.0, 10.0],
        value=0.0,
        near=0.3,  # a kink
    ),
}


@pytest.mark.parametrize("engine", ["cg", "gmres"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_descent_finds_published_solutions(name, engine):
    case = PUBLISHED[name]
    x, y = (Vector(torch.tensor(t, dtype=torch.float64)) for t in (case.start, case.y))
    low, high = (torch.tensor(t, dtype=torch.float64) for t in case.box)
    lower = mlo.Problem(
        "y",
        module=y,
        optimizer=torch.optim.SGD(y.parameters(), lr=0.25),
        loss=lambda y, _, *, x: case.lower(x.v, y.v),
        steps=100,
        after_step=lambda p, *, x: {"v": constraints.box(p["v"], *case.bounds(x.v))},
    )
    upper = mlo.Problem(
        "x",
        module=x,
        optimizer=torch.optim.SGD(x.parameters(), lr=0.1),
        loss=lambda x, _, *, y: case.upper(x.v, y.v),
        after_step=lambda p: {"v": constraints.box(p["v"], low, high)},
    )
    optimizer = mlo.MultilevelOptimizer([lower, upper], engine)
    for _ in range(60):
        optimizer.step()
    torch.testing.assert_close(x.v.detach(), torch.tensor(case.x).double(), atol=case.near, rtol=0)
    assert float(case.upper(x.v, y.v)) == pytest.approx(case.value, abs=case.near)
    if case.near < 0.2:
        assert float(optimizer.gradient("x")["v"].norm()) < case.near


# ------------------------------ what is refused, and said


@pytest.mark.parametrize("engine", ["penalty", {"name": "cg", "products": "finite_difference"}])
def test_engines_without_residuals_are_refused(engine):
    with pytest.raises(mlo.EngineError, match="fixed point of projected steps"):
        quadratic(lambda p: constraints.nonnegative(p), engine)


def test_a_learning_rate_of_zero_defines_no_fixed_point():
    _, _, optimizer = quadratic(lambda p: constraints.nonnegative(p), "gmres", steps=1)
    optimizer.problems["w"].optimizers["w"].param_groups[0]["lr"] = 0.0
    with pytest.raises(mlo.EngineError, match="learning rate of 'v' is zero"):
        optimizer.step()


def test_another_optimizer_than_sgd_is_warned_of():
    w, x = Vector(torch.ones(2)), Vector(torch.ones(1))
    lower = mlo.Problem(
        "w",
        module=w,
        optimizer=torch.optim.Adam(w.parameters()),
        loss=lambda w, _, *, x: (w.v * x.v).sum(),
        after_step=constraints.nonnegative,
    )
    upper = mlo.Problem(
        "x",
        module=x,
        optimizer=torch.optim.SGD(x.parameters(), lr=0.1),
        loss=lambda x, _, *, w: w.v.sum(),
    )
    with pytest.warns(mlo.SolveWarning, match="For Adam that holds only"):
        mlo.MultilevelOptimizer([lower, upper], "gmres")


def test_maximizing_changes_the_sign_of_the_rate():
    """max −½ wᵀHw + wᵀBx in w ≥ 0 is the minimum of the negative loss."""
    w, x = Vector(torch.full((4,), 0.2).double()), Vector(torch.tensor([0.9, 0.4]).double())
    lower = mlo.Problem(
        "w",
        module=w,
        optimizer=torch.optim.SGD(w.parameters(), lr=RATE, maximize=True),
        loss=lambda w, _, *, x: -0.5 * w.v @ H @ w.v + w.v @ (B @ x.v),
        steps=400,
        after_step=constraints.nonnegative,
    )
    upper = mlo.Problem(
        "x",
        module=x,
        optimizer=torch.optim.SGD(x.parameters(), lr=0.0),
        loss=lambda x, _, *, w: (w.v * torch.arange(1.0, 5.0, dtype=torch.float64)).sin().sum(),
    )
    optimizer = mlo.MultilevelOptimizer([lower, upper], ENGINES["cg"])
    optimizer.step()
    expected = differences(PROJECTIONS["nonnegative"], x.v.detach())
    assert relative_error(optimizer.gradient("x")["v"], expected) < 1e-6
