"""`direct`: the exact derivative by a dense solve."""

from __future__ import annotations

import pytest
import torch

import mlo
from mlo.testing import Vector, bilevel_quadratic, relative_error


def test_direct_on_a_trilevel_problem_that_is_no_quadratic():
    """`direct` equals finite differences of the problem that is solved again.

    Third derivatives of the lowest loss matter here; the oracle solves all levels again at x ± e.
    """
    torch.manual_seed(0)
    b, d, t, s = (torch.randn(3, 3, dtype=torch.float64) for _ in range(4))
    t, s = t[0], s[0]

    def low(w, m, x):
        return (
            (torch.cosh(w) + 0.1 * w**4).sum()
            + 0.5 * (w**2).sum()
            - w @ (b @ m)
            - (w * torch.tanh(d @ x)).sum()
        )

    def middle(m, w, x):
        return torch.cosh(m).sum() + 0.5 * ((w - t) ** 2).sum() + 0.3 * torch.sin(m * x).sum()

    def upper(x, m, w):
        return 0.5 * ((m - s) ** 2).sum() + torch.sin(w).sum()

    def solve_low(m, x):
        w = torch.zeros(3, dtype=torch.float64)
        for _ in range(50):
            w = w.detach().requires_grad_()
            (g,) = torch.autograd.grad(low(w, m.detach(), x.detach()), w, create_graph=True)
            move = torch.linalg.solve(
                torch.stack([torch.autograd.grad(e, w, retain_graph=True)[0] for e in g]),
                g.detach(),
            )
            w = w.detach() - move
            if move.norm() < 1e-14:
                break
        # One differentiable Newton step at the root has the implicit function's first derivatives.
        w = w.detach().requires_grad_()
        (g,) = torch.autograd.grad(low(w, m, x), w, create_graph=True)
        return w, g

    def total_middle_gradient(m, x):
        m = m.detach().requires_grad_()
        w, g = solve_low(m, x)
        hessian = torch.stack([torch.autograd.grad(e, w, retain_graph=True)[0] for e in g])
        direct_m, v = torch.autograd.grad(middle(m, w, x), [m, w])
        q = torch.linalg.solve(hessian.T, v)
        (implicit,) = torch.autograd.grad(g, m, -q)
        return (direct_m + implicit).detach()

    def solve_middle(x):
        m = torch.zeros(3, dtype=torch.float64)
        for _ in range(60):
            columns = [
                (total_middle_gradient(m + 1e-5 * e, x) - total_middle_gradient(m - 1e-5 * e, x))
                / 2e-5
                for e in torch.eye(3, dtype=torch.float64)
            ]
            move = torch.linalg.solve(torch.stack(columns, 1), total_middle_gradient(m, x))
            m = m - move
            if move.norm() < 1e-12:
                break
        return m

    x = 0.3 * torch.randn(3, dtype=torch.float64)

    def value(x):
        m = solve_middle(x)
        return float(upper(x, m, solve_low(m, x)[0].detach()))

    expected = torch.tensor(
        [
            (value(x + 1e-5 * e) - value(x - 1e-5 * e)) / 2e-5
            for e in torch.eye(3, dtype=torch.float64)
        ],
        dtype=torch.float64,
    )
    m = solve_middle(x)
    w = solve_low(m, x)[0].detach()
    modules = {"w": Vector(w), "m": Vector(m), "x": Vector(x)}

    def make(name, loss):
        return mlo.Problem(
            name,
            module=modules[name],
            optimizer=torch.optim.SGD(modules[name].parameters(), lr=0.1),
            loss=loss,
        )

    optimizer = mlo.MultilevelOptimizer(
        [
            make("w", lambda w, _, *, m, x: low(w.v, m.v, x.v)),
            make("m", lambda m, _, *, w, x: middle(m.v, w.v, x.v)),
            make("x", lambda x, _, *, m, w: upper(x.v, m.v, w.v)),
        ],
        hypergradient="direct",
    )
    assert relative_error(optimizer.gradient("x")["v"], expected) < 1e-7


def test_direct_refuses_a_singular_jacobian_and_a_large_problem():
    module = Vector(torch.ones(3))
    upper = Vector(torch.ones(3))
    problems = [
        mlo.Problem(
            "w",
            module=module,
            optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
            loss=lambda w, _, *, x: (w.v[:2] * x.v[:2]).sum() ** 2,
        ),
        mlo.Problem(
            "x",
            module=upper,
            optimizer=torch.optim.SGD(upper.parameters(), lr=0.1),
            loss=lambda x, _, *, w: (w.v**2).sum(),
        ),
    ]
    with pytest.raises(mlo.EngineError, match="singular"):
        mlo.MultilevelOptimizer(problems, "direct").gradient("x")
    with pytest.raises(mlo.EngineError, match="3 parameters"):
        mlo.MultilevelOptimizer(problems, mlo.Direct(max_parameters=2)).gradient("x")


def test_a_solve_that_does_not_converge_warns_once():
    """A solve that does not converge warns once, and is in every record."""
    problem = bilevel_quadratic(dtype=torch.float32)
    optimizer = problem.optimizer(mlo.Direct(tol=1e-30))
    with pytest.warns(mlo.SolveWarning, match=r"'direct' did not converge on problem 'w'"):
        first = optimizer.step()
    second = optimizer.step()  # a second warning would be an error here
    assert not first.solves["w"].converged
    assert not second.solves["w"].converged
    assert second.solves["w"].residual > 0
