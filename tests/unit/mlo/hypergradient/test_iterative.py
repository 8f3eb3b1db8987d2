"""What the iterative engines share: damping, precision, warm starts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from quadratics import DIM, POSITIVE, quadratic

import mlo
from mlo.hypergradient import FlatOperator, Solve
from mlo.testing import Vector, bilevel_quadratic, identical, relative_error, snapshot


@pytest.mark.parametrize(
    "engine",
    [
        "cg",
        "minres",
        "gmres",
        "normal_cg",
        "direct",
        {"name": "nystrom", "max_steps": 30, "tol": 1e-10},
        "neumann",
    ],
    ids=str,
)
def test_damping_is_added_to_the_jacobian(engine):
    options = {"name": engine} if isinstance(engine, str) else dict(engine)
    if engine == "neumann":
        options["num_terms"] = 300
    optimizer, b, v = quadratic(POSITIVE, {**options, "damping": 0.2})
    expected = b.T @ torch.linalg.solve(POSITIVE + 0.2 * torch.eye(DIM).double(), v)
    assert relative_error(optimizer.gradient("x")["v"], expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "engine",
    ["cg", "minres", "gmres", "normal_cg", "nystrom", {"name": "neumann", "num_terms": 300}],
    ids=str,
)
def test_solves_reach_what_the_dtype_allows(engine, dtype):
    options = {"name": engine} if isinstance(engine, str) else dict(engine)
    if options["name"] == "nystrom":
        options |= {"max_steps": 30}
    optimizer, b, v = quadratic(POSITIVE, options, dtype=dtype)
    expected = b.T @ torch.linalg.solve(POSITIVE.to(dtype), v)
    assert relative_error(optimizer.gradient("x")["v"], expected) < 2e-5


@pytest.mark.filterwarnings("ignore::mlo.SolveWarning")
def test_a_warm_start_continues_from_the_last_solution():
    warm, *_ = quadratic(POSITIVE, mlo.ConjugateGradient(max_steps=2, warm_start=True))
    residuals = [warm.step().solves["w"].residual for _ in range(8)]
    assert residuals[-1] < 0.1 * residuals[0]
    cold, *_ = quadratic(POSITIVE, mlo.ConjugateGradient(max_steps=2))
    assert math.isclose(cold.step().solves["w"].residual, residuals[0], rel_tol=1e-9)


@pytest.mark.filterwarnings("ignore::mlo.SolveWarning")
def test_a_warm_start_is_part_of_the_state(tmp_path):
    """A warm start is part of the state, and `gradient` leaves it alone."""
    engine = mlo.ConjugateGradient(max_steps=2, warm_start=True)
    whole = bilevel_quadratic().optimizer(engine)
    list(whole.run(3))
    before = snapshot(whole)
    whole.gradient("x")
    assert identical(before, snapshot(whole))
    mlo.save_checkpoint(whole.state_dict(), tmp_path / "s.pt")
    resumed = bilevel_quadratic().optimizer(engine)
    resumed.load_state_dict(mlo.load_checkpoint(tmp_path / "s.pt"))
    assert whole.step().solves == resumed.step().solves
    assert identical(snapshot(whole), snapshot(resumed))


@pytest.mark.parametrize(
    "engine", ["cg", "minres", "gmres", {"name": "nystrom", "rank": 1}, "direct"], ids=str
)
def test_the_derivative_of_a_solve_is_that_of_its_solution(engine):
    """Of a cotangent along an eigenvector a Krylov method sees that eigenvalue only, and ends.

    The derivative of its steps says nothing of the other eigenvalues, which a change of A or of the
    cotangent brings in.
    """
    a = POSITIVE.clone().requires_grad_()
    b = torch.linalg.eigh(POSITIVE).eigenvectors[:, 2].clone().requires_grad_()

    def solution(a, b):
        w = torch.linalg.solve(a, b).detach()
        symmetric = (a + a.T) / 2
        return mlo.implicit_solution(
            w,
            (symmetric, b),
            loss=lambda w, reads: 0.5 * w @ reads[0] @ w - w @ reads[1],
            engine=engine,
        )

    def exact(a, b):
        return torch.linalg.solve((a + a.T) / 2, b)

    def second(function):
        first = torch.autograd.grad(function(a, b).square().sum(), [a, b], create_graph=True)
        return torch.autograd.grad(sum(g.pow(3).sum() for g in first), [a, b])

    for found, expected in zip(second(solution), second(exact), strict=True):
        assert relative_error(found, expected) < 1e-8


def test_the_adjoint_of_an_operator_is_its_transpose():
    """Of a Jacobian that is not symmetric, with damping."""
    matrix = torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(3)).double()
    seen = {}

    @dataclass(frozen=True, kw_only=True)
    class Look(mlo.Engine):
        name = "look"

        def solve(self, system, cotangent):
            operator = FlatOperator(system, 0.5)
            for name, of in (("it", operator), ("adjoint", operator.adjoint())):
                seen[name] = torch.stack([of(e) for e in torch.eye(DIM).double()], dim=1).detach()
            return Solve(q=list(cotangent), report=self.report(system.problem))

    w, x = torch.zeros(DIM).double(), torch.ones(DIM).double().requires_grad_()
    found = mlo.implicit_solution(
        w, x, stationarity=lambda w, x: matrix @ w - 0.0 * x, engine=Look()
    )
    torch.autograd.grad(found.sum(), x, create_graph=True)
    damping = 0.5 * torch.eye(DIM).double()
    assert relative_error(seen["it"], matrix.T + damping) < 1e-12
    assert relative_error(seen["adjoint"], matrix + damping) < 1e-12


def test_a_solve_in_the_second_derivative_is_reported():
    reports = []
    x = torch.ones(DIM).double().requires_grad_()
    w = torch.linalg.solve(POSITIVE, x).detach()
    found = mlo.implicit_solution(
        w, x, loss=lambda w, x: 0.5 * w @ POSITIVE @ w - w @ x, reports=reports
    )
    (first,) = torch.autograd.grad(found.square().sum(), x, create_graph=True)
    before = len(reports)
    first.sum().backward()
    # One of the solution once more, and one of the derivative of the first solve.
    assert len(reports) == before + 2
    assert all(report.converged for report in reports)
    assert min(report.iterations for report in reports[before:]) > 0


@pytest.mark.parametrize(
    "engine",
    [
        {"name": "cg", "tol": 1e-13},
        {"name": "minres", "tol": 1e-13},
        {"name": "gmres", "tol": 1e-13},
        {"name": "nystrom", "max_steps": 30, "tol": 1e-13},
        {"name": "normal_cg", "tol": 1e-13},
        {"name": "neumann", "num_terms": 400, "tol": 1e-6},
        "direct",
    ],
    ids=lambda engine: engine if isinstance(engine, str) else engine["name"],
)
def test_a_solve_of_zero_has_the_derivative_of_a_solve(engine):
    """The middle problem's residual is zero, as at equal start values: q is zero, dq/dv is not."""
    w, m, x = Vector(torch.zeros(3).double()), Vector(torch.zeros(3).double()), Vector(ones(2))
    a = torch.tensor([[2.0, 0.5, 0.0], [0.5, 1.0, 0.2], [0.0, 0.2, 1.5]], dtype=torch.float64)
    b = torch.tensor([[1.0, 0.0], [0.5, -1.0], [0.2, 0.7]], dtype=torch.float64)
    lowest = mlo.Problem(
        "w",
        module=w,
        optimizer=torch.optim.SGD(w.parameters(), lr=0.0),
        loss=lambda w, _, *, m: 0.5 * w.v @ a @ w.v - w.v @ m.v,
    )
    middle = mlo.Problem(
        "m",
        module=m,
        optimizer=torch.optim.SGD(m.parameters(), lr=0.0),
        loss=lambda m, _, *, w, x: 0.5 * w.v.square().sum() + (m.v - b @ (x.v - 1)).square().sum(),
    )
    top = mlo.Problem(
        "x",
        module=x,
        optimizer=torch.optim.SGD(x.parameters(), lr=0.0),
        loss=lambda x, _, *, m: (m.v * torch.tensor([1.0, 2.0, 3.0]).double()).sum(),
    )
    found = mlo.MultilevelOptimizer([lowest, middle, top], {"w": engine, "m": "direct"})
    # M(m) = ½ ‖A⁻¹ m‖² + ‖m − B (x − 1)‖², so M'' = A⁻² + 2 I and ∂²M/∂m∂x = −2 B.
    inverse = torch.linalg.inv(a)
    hessian = inverse @ inverse + 2 * torch.eye(3, dtype=torch.float64)
    expected = 2 * b.T @ torch.linalg.solve(hessian, torch.tensor([1.0, 2.0, 3.0]).double())
    assert relative_error(found.gradient("x")["v"], expected) < 1e-8


def ones(size):
    return torch.ones(size, dtype=torch.float64)


KRYLOV = ["cg", "minres", "gmres", "normal_cg", {"name": "nystrom", "max_steps": 30}]


@pytest.mark.parametrize("engine", KRYLOV, ids=str)
@pytest.mark.parametrize("size", [1e-18, 1e18])
def test_cotangents_whose_squares_underflow_are_solved(engine, size):
    """Or overflow, in float32."""
    optimizer, b, v = quadratic(POSITIVE, engine, dtype=torch.float32)
    upper = optimizer.problems["x"]
    scaled = mlo.Problem(
        "x",
        module=upper.module,
        optimizer=upper.optimizers["x"],
        loss=lambda x, _, *, w: size * (w.v @ v),
    )
    problems = [optimizer.problems["w"], scaled]
    found = mlo.MultilevelOptimizer(problems, engine).gradient("x", report=True)
    expected = b.T @ torch.linalg.solve(POSITIVE.float(), v)
    assert relative_error(found.gradient["v"] / size, expected) < 2e-5
    assert found.reports[0].converged


@pytest.mark.parametrize("engine", KRYLOV, ids=str)
@pytest.mark.filterwarnings("ignore::mlo.SolveWarning")
def test_with_a_tolerance_of_zero_all_steps_stay_finite(engine):
    options = {"name": engine} if isinstance(engine, str) else engine
    optimizer, b, v = quadratic(
        POSITIVE, {**options, "max_steps": 200, "tol": 0.0}, dtype=torch.float32
    )
    expected = b.T @ torch.linalg.solve(POSITIVE.float(), v)
    assert relative_error(optimizer.gradient("x")["v"], expected) < 2e-5


@pytest.mark.parametrize(
    "engine",
    [
        *[{"name": name, "warm_start": True} for name in ("cg", "minres", "gmres", "normal_cg")],
        {"name": "nystrom", "warm_start": True},
        {"name": "neumann", "warm_start": True},
        {"name": "sid", "warm_start": True},
        "penalty",
        "soba",
    ],
    ids=lambda engine: engine if isinstance(engine, str) else engine["name"],
)
@pytest.mark.filterwarnings("ignore::mlo.SolveWarning")
def test_a_solve_that_is_not_finite_is_not_resumed(engine):
    """The next solve starts as the first one does."""
    weight = torch.tensor(1.0, dtype=torch.float64)

    def made():
        optimizer, _, v = quadratic(POSITIVE, engine)
        upper = optimizer.problems["x"]
        weighed = mlo.Problem(
            "x",
            module=upper.module,
            optimizer=upper.optimizers["x"],
            loss=lambda x, _, *, w: weight * (w.v @ v),
        )
        return mlo.MultilevelOptimizer(
            [optimizer.problems["w"], weighed], engine, on_nonfinite=None
        )

    first = made().gradient("x")["v"]
    optimizer = made()
    weight.fill_(math.nan)
    optimizer.step()
    for problem in optimizer.problems.values():
        for parameter in problem.parameters.values():
            parameter.data.zero_()  # as they were
    weight.fill_(1.0)
    assert relative_error(optimizer.gradient("x")["v"], first) < 1e-9


@pytest.mark.parametrize(
    "engine", ["cg", "minres", "gmres", "normal_cg", "nystrom", "neumann", "direct"]
)
def test_a_product_that_is_not_finite_is_named_as_the_cause(engine):
    """At zero |w|^1.5 has the derivative 0, and no second derivative."""
    w, x = torch.zeros(2, dtype=torch.float64), ones(2).requires_grad_()
    reports = []
    found = mlo.implicit_solution(
        w,
        x,
        loss=lambda w, x: (w.abs() ** 1.5).sum() + w @ (x - 1.0),
        engine=engine,
        reports=reports,
    )
    with pytest.warns(mlo.SolveWarning, match="A product with the Jacobian is not finite"):
        found.sum().backward()
    assert reports[-1].failed
    assert reports[-1].curvature is None
