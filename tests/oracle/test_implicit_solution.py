"""Solutions of other solvers, differentiated, against closed forms and autograd through solvers."""

from __future__ import annotations

import warnings

import pytest
import torch
from sklearn.datasets import load_diabetes
from sklearn.linear_model import Lasso, LogisticRegression, Ridge
from torch.nn import functional as F

import mlo
from mlo.testing import relative_error


def diabetes():
    """Standardized features [442, 10] and targets [442] of scikit-learn's `diabetes`."""
    data = load_diabetes()
    x, y = torch.tensor(data.data), torch.tensor(data.target)
    return (x - x.mean(0)) / x.std(0), (y - y.mean()) / y.std()


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def twice(function, x):
    """The gradient of Σ w f(x) with fixed weights w, and that of half its square."""
    value = function(x)
    weights = normal(*value.shape, seed=9)
    (first,) = torch.autograd.grad((weights * value**2).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(0.5 * first.square().sum(), x)
    return first.detach(), second


@pytest.fixture(autouse=True)
def no_warning():
    """No solution here is a bad one, and no solve is inexact."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", mlo.SolveWarning)
        yield


# ------------------------------ scikit-learn as the solver


@pytest.mark.parametrize("engine", ["cg", "minres", "gmres", "direct", "nystrom"])
def test_ridge_of_scikit_learn(engine):
    x, y = diabetes()
    log_decay = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)

    def solve(log_decay):
        model = Ridge(alpha=float(log_decay.exp()), fit_intercept=False, tol=1e-12)
        return torch.as_tensor(model.fit(x, y).coef_)

    def loss(w, log_decay):
        return (x @ w - y).square().sum() + log_decay.exp() * w.square().sum()

    def ours(log_decay):
        return mlo.implicit_solution(solve(log_decay.detach()), log_decay, loss=loss, engine=engine)

    def exact(log_decay):
        eye = torch.eye(10, dtype=torch.float64)
        return torch.linalg.solve(x.T @ x + log_decay.exp() * eye, x.T @ y)

    for found, expected in zip(twice(ours, log_decay), twice(exact, log_decay), strict=True):
        assert relative_error(found, expected) < 1e-8


def logistic_loss(w, decays, x, labels):
    return F.cross_entropy(x @ w.T, labels) + 0.5 * (decays.exp() * w.square()).sum()


def by_newton(loss, start, reads, steps=9):
    """Newton's method, which autograd can differentiate as often as it likes."""
    w = start
    for _ in range(steps):
        flat = w.flatten().detach().requires_grad_() if not w.requires_grad else w.flatten()
        gradient = torch.autograd.functional.jacobian(
            lambda t: loss(t.view_as(start), reads), flat, create_graph=True
        )
        hessian = torch.autograd.functional.hessian(
            lambda t: loss(t.view_as(start), reads), flat, create_graph=True
        )
        w = (flat - torch.linalg.solve(hessian, gradient)).view_as(start)
    return w


def test_logistic_regression_of_scikit_learn_twice():
    """The second derivative contains the third ones of the loss."""
    x, y = diabetes()
    x, labels = x[:100, :4], (y[:100] > 0).long()
    decays = torch.full((2, 4), -3.0, dtype=torch.float64, requires_grad=True)

    def loss(w, decays):
        return logistic_loss(w, decays, x, labels)

    def solve(decays):
        # Its penalty is one number, here that of all decays, and of the difference of two classes.
        c = 2.0 / (len(x) * float(decays.exp().mean()))
        model = LogisticRegression(C=c, fit_intercept=False, tol=1e-12, max_iter=1000)
        coefficients = torch.as_tensor(model.fit(x, labels).coef_[0])
        return torch.stack([-coefficients, coefficients]) / 2.0

    def ours(decays):
        return mlo.implicit_solution(solve(decays.detach()), decays, loss=loss)

    def naive(decays):
        return by_newton(loss, torch.zeros(2, 4, dtype=torch.float64), decays)

    assert relative_error(ours(decays), naive(decays)) < 1e-7
    found, expected = twice(ours, decays), twice(naive, decays)
    # As near as the solver came.
    assert relative_error(found[0], expected[0]) < 1e-6
    assert relative_error(found[1], expected[1]) < 1e-6


def soft_threshold(w, threshold):
    return w.sign() * (w.abs() - threshold).clamp(min=0.0)


def lasso_of(x, y, decay):
    model = Lasso(alpha=decay, fit_intercept=False, tol=1e-14, max_iter=100_000)
    return torch.as_tensor(model.fit(x, y).coef_)


def lasso_responses(x, y, decay, h=1e-5):
    """d w / d decay, and d w / d y along a direction, by solving again."""
    along = normal(len(y), seed=4)
    by_decay = (lasso_of(x, y, decay + h) - lasso_of(x, y, decay - h)) / (2 * h)
    by_y = (lasso_of(x, y + h * along, decay) - lasso_of(x, y - h * along, decay)) / (2 * h)
    return by_decay, by_y, along


@pytest.mark.parametrize("engine", ["gmres", "direct"])
def test_lasso_as_the_fixed_point_of_its_proximal_step(engine):
    """T = soft_threshold(w − η ∇L, η λ), whose Jacobian is not symmetric."""
    x, y = diabetes()
    decay = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    target = y.clone().requires_grad_()
    w = lasso_of(x, y, float(decay.detach()))
    eta = len(x) / float(torch.linalg.matrix_norm(x, 2)) ** 2

    def proximal_step(w, reads):
        slope = x.T @ (x @ w - reads["y"]) / len(x)
        return soft_threshold(w - eta * slope, eta * reads["decay"])

    reads = {"decay": decay, "y": target}
    found = mlo.implicit_solution(w, reads, fixed_point=proximal_step, engine=engine)
    by_decay, by_y, along = lasso_responses(x, y, float(decay.detach()))
    active = (w != 0).nonzero().flatten().tolist()
    assert 3 <= len(active) <= 8
    for index in range(10):
        slopes = torch.autograd.grad(found[index], [decay, target], retain_graph=True)
        assert float(slopes[0] - by_decay[index]) == pytest.approx(0.0, abs=1e-6)
        assert float(slopes[1] @ along - by_y[index]) == pytest.approx(0.0, abs=1e-6)
        assert (float(slopes[0].abs()) > 1e-3) == (index in active)


def test_lasso_on_its_active_set():
    """Where the solution is not zero the loss is smooth; the other entries do not move."""
    x, y = diabetes()
    decay = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    w = lasso_of(x, y, float(decay.detach()))
    active = w != 0

    def loss(w, decay):
        residual = (x[:, active] @ w - y).square().sum() / (2 * len(x))
        return residual + decay * (w * w.detach().sign()).sum()

    found = mlo.implicit_solution(w[active], decay, loss=loss)
    by_decay, *_ = lasso_responses(x, y, float(decay.detach()))
    slopes = [torch.autograd.grad(entry, decay, retain_graph=True)[0] for entry in found]
    assert torch.stack(slopes).sub(by_decay[active]).abs().max() < 1e-6
    assert not by_decay[~active].any()


# ------------------------------ torch.optim.LBFGS as the solver, of a module


def dense_response(function, theta, reads):
    """dθ/dx [n, m] = −A⁻¹ B of a loss, from dense second derivatives."""
    jacobian = torch.func.hessian(function, argnums=0)(theta, reads)
    mixed = torch.func.jacrev(torch.func.grad(function), argnums=1)(theta, reads)
    return -torch.linalg.solve(jacobian, mixed)


@pytest.mark.parametrize("engine", [{"name": "cg", "max_steps": 200, "tol": 1e-12}, "direct"])
def test_a_module_trained_by_lbfgs(engine):
    x, y, scores = normal(12, 3), normal(12, 1, seed=1), normal(12, seed=2).requires_grad_()
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1)
    ).double()

    def loss(params, scores):
        errors = (torch.func.functional_call(net, params, x) - y).square().flatten()
        decay = sum(p.square().sum() for p in params.values())
        return (scores.sigmoid() * errors).mean() + 0.05 * decay

    optimizer = torch.optim.LBFGS(
        net.parameters(),
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        value = loss(dict(net.named_parameters()), scores.detach())
        value.backward()
        return value

    optimizer.step(closure)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    found = mlo.implicit_solution(dict(net.named_parameters()), scores, loss=loss, engine=engine)
    assert all(torch.equal(found[name], before[name]) for name in before)

    held_out = normal(5, 3, seed=3)
    upper = torch.func.functional_call(net, found, held_out).square().sum()
    (gradient,) = torch.autograd.grad(upper, scores)

    names, shapes = list(before), [p.shape for p in before.values()]

    def named(flat):
        parts = flat.split([shape.numel() for shape in shapes])
        return {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}

    flat = torch.cat([p.flatten() for p in before.values()])
    response = dense_response(lambda t, s: loss(named(t), s), flat, scores.detach())
    slope = torch.func.grad(
        lambda t: torch.func.functional_call(net, named(t), held_out).square().sum()
    )(flat)
    assert relative_error(gradient, response.T @ slope) < 1e-8


# ------------------------------ a deep equilibrium layer


def cell(z, reads):
    """One iteration [n, 6] → [n, 6] of a contraction."""
    return torch.tanh(z @ reads["w"].T + reads["x"] @ reads["u"].T + reads["b"])


def iterated(reads, steps=200):
    z = torch.zeros(len(reads["x"]), 6, dtype=reads["x"].dtype)
    for _ in range(steps):
        z = cell(z, reads)
    return z


def equilibrium():
    w = normal(6, 6, seed=1)
    return {
        "w": (0.7 * w / torch.linalg.matrix_norm(w, 2)).requires_grad_(),
        "u": normal(6, 3, seed=2).requires_grad_(),
        "b": normal(6, seed=3).requires_grad_(),
        "x": normal(4, 3, seed=4).requires_grad_(),
    }


@pytest.mark.parametrize(
    "engine",
    [
        {"name": "gmres", "tol": 1e-12},
        {"name": "neumann", "num_terms": 120, "step_size": 1.0},
        "direct",
    ],
    ids=str,
)
def test_a_deep_equilibrium_layer(engine):
    """The gradients in its weights and in its input are those through many iterations."""
    reads = equilibrium()
    with torch.no_grad():
        z = iterated(reads)
    found = mlo.implicit_solution(z, reads, fixed_point=cell, engine=engine)
    target = normal(4, 6, seed=5)
    ours = torch.autograd.grad((found - target).square().sum(), list(reads.values()))
    naive = torch.autograd.grad((iterated(reads) - target).square().sum(), list(reads.values()))
    for one, other in zip(ours, naive, strict=True):
        assert relative_error(one, other) < 1e-9


@pytest.mark.parametrize("terms", [1, 3, 8])
def test_the_truncated_neumann_series_of_a_layer_is_its_formula(terms):
    """K terms with step 1 are the gradient through the last K iterations at the equilibrium."""
    reads = equilibrium()
    with torch.no_grad():
        z = iterated(reads)
    engine = {"name": "neumann", "num_terms": terms, "step_size": 1.0, "tol": 1e9}
    found = mlo.implicit_solution(z, reads, fixed_point=cell, engine=engine)
    last = z
    for _ in range(terms):
        last = cell(last, reads)
    ours = torch.autograd.grad(found.pow(3).sum(), list(reads.values()))
    naive = torch.autograd.grad(last.pow(3).sum(), list(reads.values()))
    for one, other in zip(ours, naive, strict=True):
        assert relative_error(one, other) < 1e-12


def test_a_deep_equilibrium_layer_twice():
    """A gradient penalty in the input, differentiated in the weights."""
    reads = equilibrium()

    def penalty(layer):
        (slope,) = torch.autograd.grad(layer(reads).pow(2).sum(), reads["x"], create_graph=True)
        return torch.autograd.grad(slope.square().sum(), [reads["w"], reads["b"]])

    def implicit(reads):
        with torch.no_grad():
            z = iterated(reads)
        return mlo.implicit_solution(
            z, reads, fixed_point=cell, engine={"name": "gmres", "tol": 1e-12}
        )

    for one, other in zip(penalty(implicit), penalty(iterated), strict=True):
        assert relative_error(one, other) < 1e-9


# ------------------------------ an optimization layer


def kkt(solution, reads):
    """Of min ½ zᵀQz + pᵀz subject to Gz = h, with the multipliers of its constraints."""
    z, multipliers = solution["z"], solution["multipliers"]
    return {
        "multipliers": reads["g"] @ z - reads["h"],
        "z": reads["q"] @ z + reads["p"] + reads["g"].T @ multipliers,
    }


def solved(reads):
    """z and the multipliers, by one differentiable linear solve."""
    q, g = reads["q"], reads["g"]
    zeros = torch.zeros(2, 2, dtype=torch.float64)
    matrix = torch.cat([torch.cat([q, g.T], 1), torch.cat([g, zeros], 1)])
    both = torch.linalg.solve(matrix, torch.cat([-reads["p"], reads["h"]]))
    return {"z": both[:5], "multipliers": both[5:]}


@pytest.mark.parametrize("engine", ["minres", "gmres", "direct"])
def test_an_optimization_layer_by_its_kkt_conditions(engine):
    root = normal(5, 5)
    reads = {
        "q": (root @ root.T + torch.eye(5, dtype=torch.float64)).requires_grad_(),
        "p": normal(5, seed=1).requires_grad_(),
        "g": normal(2, 5, seed=2).requires_grad_(),
        "h": normal(2, seed=3).requires_grad_(),
    }
    weights = normal(5, seed=5)

    def layer(reads):
        with torch.no_grad():
            solution = solved(reads)
        return mlo.implicit_solution(
            solution, reads, stationarity=kkt, engine={"name": engine, **tight(engine)}
        )

    def both(layer):
        found = layer(reads)
        value = weights @ found["z"] ** 2 + found["multipliers"].sum()
        first = torch.autograd.grad(value, list(reads.values()), create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), list(reads.values()))
        return [*first, *second]

    for one, other in zip(both(layer), both(solved), strict=True):
        assert relative_error(one, other) < 1e-8


def tight(engine):
    return {} if engine == "direct" else {"tol": 1e-13}


def test_an_equilibrium_of_two_players():
    """F of two losses has a Jacobian that is not symmetric."""
    a, x = normal(3, 3), normal(3, seed=1).requires_grad_()

    def stationarity(players, x):
        one, two = players
        return (one + a @ two - x, two - a.T @ one + (x**2).sum() * two.tanh())

    def newton(x):
        start = torch.zeros(6, dtype=torch.float64)
        for _ in range(20):
            f = torch.cat(stationarity(start.split(3), x))
            jacobian = torch.func.jacrev(lambda t: torch.cat(stationarity(t.split(3), x)))(start)
            start = start - torch.linalg.solve(jacobian, f)
        return start

    def ours(x):
        with torch.no_grad():
            players = newton(x).split(3)
        return torch.cat(
            mlo.implicit_solution(
                players, x, stationarity=stationarity, engine={"name": "gmres", "tol": 1e-13}
            )
        )

    for found, expected in zip(twice(ours, x), twice(newton, x), strict=True):
        assert relative_error(found, expected) < 1e-9


# ------------------------------ within larger graphs


def test_reads_may_be_the_outputs_of_another_network():
    x, y = diabetes()
    x, y = x[:30, :3], y[:30]
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)
    ).double()

    def loss(w, reads):
        features, decay = reads
        return (features @ w - y).square().mean() + decay * w.square().sum()

    def exact(features, decay):
        eye = decay * torch.eye(3, dtype=torch.float64)
        return torch.linalg.solve(features.T @ features / 30 + eye, features.T @ y / 30)

    def upper(w, features):
        # The features reach the upper loss directly, and through the regression on them.
        return (features @ w - y).abs().sum() + w.pow(3).sum()

    decay = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    wanted = [*net.parameters(), decay]
    features = net(x)
    w = mlo.implicit_solution(
        exact(features, decay), (features, decay), loss=loss, engine={"name": "cg", "tol": 1e-12}
    )
    ours = torch.autograd.grad(upper(w, features), wanted)
    features = net(x)
    naive = torch.autograd.grad(upper(exact(features, decay), features), wanted)
    for one, other in zip(ours, naive, strict=True):
        assert relative_error(one, other) < 1e-10


def test_finite_differences_agree_in_both_orders():
    """PyTorch's own checks, of a loss whose third and fourth derivatives count."""

    def loss(w, x):
        return ((w - x) ** 2).sum() + 0.1 * (w**4).sum() + (w[0] * w[1] * x.sum()).sin()

    def solution(x):
        w = by_newton(loss, x.detach().clone(), x.detach(), steps=12)
        return mlo.implicit_solution(w, x, loss=loss, engine="direct")

    x = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(solution, x)
    assert torch.autograd.gradgradcheck(solution, x)
