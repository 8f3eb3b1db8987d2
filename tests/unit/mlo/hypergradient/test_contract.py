"""The registered engines: the contract, configuration by name, and what they refuse."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import nn

import mlo
import mlo.testing
from mlo.testing import (
    ClosedForm,
    EngineContract,
    Vector,
    bilevel_quadratic,
    bilinear_game,
    chain_of_three,
    diamond,
    relative_error,
    trilevel_quadratic,
)

KNOWN_WARNINGS = [
    "ignore:.*solves with finite differences",
    "ignore:Engine .* did not converge",  # truncated ones, on purpose
    "ignore:The gradient of problem .* is zero",
]


def krylov_minimiser(matrix, v, steps, *, residual):
    """The x in span{v, Av, …} with least ‖v − Ax‖ (residual), or least energy ½ xᵀAx − xᵀv (a
    Galerkin solution).
    """
    columns = [v]
    for _ in range(steps - 1):
        columns.append(matrix @ columns[-1])
    basis, _ = torch.linalg.qr(torch.stack(columns, 1))
    if residual:
        return basis @ torch.linalg.lstsq(matrix @ basis, v.unsqueeze(1)).solution.squeeze(1)
    return basis @ torch.linalg.solve(basis.T @ matrix @ basis, basis.T @ v)


def series(matrix, v, *, terms, alpha):
    total, term = torch.zeros_like(v), alpha * v
    for _ in range(terms):
        total, term = total + term, term - alpha * (matrix @ term)
    return total


class Exact(EngineContract):
    exact = True


class OneStepOfSgd(EngineContract):
    """At an optimum the step does not move, and q = lr · v."""

    def inverse(self, jacobian, v):
        return mlo.testing.LEARNING_RATE * v


@pytest.mark.filterwarnings(*KNOWN_WARNINGS)
class TestDirect(Exact):
    def make_engine(self):
        return mlo.Direct()


@pytest.mark.filterwarnings(*KNOWN_WARNINGS)
class TestOneStep(OneStepOfSgd):
    def make_engine(self):
        return mlo.OneStep()


@pytest.mark.filterwarnings(*KNOWN_WARNINGS)
class TestOneStepThatKeepsItsGraph(OneStepOfSgd):
    def make_engine(self):
        return mlo.OneStep(keep_graph=True)


class TestUnroll(OneStepOfSgd):
    def make_engine(self):
        return mlo.Unroll()


@pytest.mark.filterwarnings(*KNOWN_WARNINGS)
class TestFirstOrder(EngineContract):
    def make_engine(self):
        return mlo.FirstOrder()

    def inverse(self, jacobian, v):
        return torch.zeros_like(v)

    def test_solves_each_lower_problem_once(self):
        record = diamond().optimizer(self.make_engine()).step()
        assert record.solves == {}  # nothing to solve

    def test_is_linear_in_the_upper_loss(self):
        problem = bilevel_quadratic()
        x = problem.value("x")
        assert torch.equal(problem.optimizer(self.make_engine()).gradient("x")["v"], 0.1 * x)


@pytest.mark.filterwarnings(*KNOWN_WARNINGS)
class TestIdentity(EngineContract):
    def make_engine(self):
        return mlo.Identity()

    def inverse(self, jacobian, v):
        return v


@pytest.mark.filterwarnings(*KNOWN_WARNINGS)
class TestNeumann(EngineContract):
    def make_engine(self):
        return mlo.Neumann(num_terms=5, step_size=0.3)

    def inverse(self, jacobian, v):
        return series(jacobian.T, v, terms=5, alpha=0.3)


@pytest.mark.filterwarnings(*KNOWN_WARNINGS)
class TestConjugateGradient(Exact):
    def make_engine(self):
        return mlo.ConjugateGradient(tol=1e-12)


@pytest.mark.filterwarnings(*KNOWN_WARNINGS)
class TestTruncatedConjugateGradient(EngineContract):
    def make_engine(self):
        return mlo.ConjugateGradient(max_steps=2)

    def inverse(self, jacobian, v):
        return (
            krylov_minimiser(jacobian.T, v, 2, residual=False)
            if not is_multiple(jacobian)
            else v / jacobian[0, 0]
        )


@pytest.mark.filterwarnings(*KNOWN_WARNINGS)
class TestMinres(Exact):
    def make_engine(self):
        return mlo.Minres(tol=1e-12)


@pytest.mark.filterwarnings(*KNOWN_WARNINGS)
class TestTruncatedMinres(EngineContract):
    def make_engine(self):
        return mlo.Minres(max_steps=2)

    def inverse(self, jacobian, v):
        return (
            krylov_minimiser(jacobian.T, v, 2, residual=True)
            if not is_multiple(jacobian)
            else v / jacobian[0, 0]
        )


@pytest.mark.filterwarnings(*KNOWN_WARNINGS)
class TestGmres(Exact):
    def make_engine(self):
        return mlo.Gmres(tol=1e-12)


@pytest.mark.filterwarnings(*KNOWN_WARNINGS)
class TestTruncatedGmres(TestTruncatedMinres):
    def make_engine(self):
        return mlo.Gmres(max_steps=2)


@pytest.mark.filterwarnings(*KNOWN_WARNINGS)
class TestNystrom(Exact):
    tolerance = 1e-7

    def make_engine(self):
        return mlo.Nystrom(rank=3, max_steps=50, tol=1e-12)


@pytest.mark.filterwarnings(*KNOWN_WARNINGS)
class TestSoba(EngineContract):
    def make_engine(self):
        return mlo.Soba(step_size=0.3)

    def inverse(self, jacobian, v):  # the first solve starts at zero
        return 0.3 * v


class TestPenalty(EngineContract):
    tolerance = 1e-7
    tolerance_float32 = 2e-3

    def make_engine(self):
        return mlo.Penalty(steps=5, step_size=0.3, tol=1.0)

    def inverse(self, jacobian, v):
        return series(jacobian.T, v, terms=5, alpha=0.3)


class OfBetty(EngineContract):
    """Betty's own functions, which leave the optimizer's weight decay out of the Hessian
    (tests/oracle/test_betty.py).
    """

    graphs = ("bilevel", "chain", "diamond", "layered", "game")

    @pytest.fixture(autouse=True)
    def _needs_betty(self):
        pytest.importorskip("betty", reason="betty-ml is not installed (make betty)")


class TestBettyDarts(OfBetty):
    tolerance = 1e-8
    tolerance_float32 = 2e-2

    def make_engine(self):
        return mlo.engine_from("betty-darts")

    def inverse(self, jacobian, v):
        return v


class TestBettyNeumann(OfBetty):
    def make_engine(self):
        return mlo.engine_from({"name": "betty-neumann", "iterations": 4, "alpha": 0.3})

    def inverse(self, jacobian, v):
        return series(jacobian, v, terms=5, alpha=0.3)


class TestBettyConjugateGradient(OfBetty):
    def make_engine(self):
        return mlo.engine_from("betty-cg")

    def inverse(self, jacobian, v):  # one iteration is a step of steepest descent
        return v * (v @ v) / (v @ jacobian @ v)


def is_multiple(jacobian):
    """Whether a matrix is a multiple of the identity, whose Krylov spaces have one dimension."""
    return torch.equal(jacobian, jacobian[0, 0] * torch.eye(len(jacobian), dtype=jacobian.dtype))


def with_finite_differences(contract):
    """The same contract with products that take no second derivative."""

    def make_engine(self):
        return dataclasses.replace(contract.make_engine(self), products="finite_difference")

    options = {
        "make_engine": make_engine,
        "exact": False,
        "tolerance": 1e-6,
        "tolerance_float32": 2e-2,
    }
    made = type(f"{contract.__name__}WithFiniteDifferences", (contract,), options)
    return pytest.mark.filterwarnings(*KNOWN_WARNINGS)(made)


class TestDarts(OneStepOfSgd):
    tolerance = 1e-6
    tolerance_float32 = 2e-3

    def make_engine(self):
        return mlo.darts()


TestDirectWithFiniteDifferences = with_finite_differences(TestDirect)
TestIdentityWithFiniteDifferences = with_finite_differences(TestIdentity)
TestNeumannWithFiniteDifferences = with_finite_differences(TestNeumann)
TestConjugateGradientWithFiniteDifferences = with_finite_differences(TestConjugateGradient)
TestMinresWithFiniteDifferences = with_finite_differences(TestMinres)
TestGmresWithFiniteDifferences = with_finite_differences(TestGmres)
TestNystromWithFiniteDifferences = with_finite_differences(TestNystrom)
TestSobaWithFiniteDifferences = with_finite_differences(TestSoba)

BY_AUTOGRAD_AND_DIFFERENCES = {
    "cg": (TestConjugateGradient, TestConjugateGradientWithFiniteDifferences),
    "direct": (TestDirect, TestDirectWithFiniteDifferences),
    "gmres": (TestGmres, TestGmresWithFiniteDifferences),
    "identity": (TestIdentity, TestIdentityWithFiniteDifferences),
    "minres": (TestMinres, TestMinresWithFiniteDifferences),
    "neumann": (TestNeumann, TestNeumannWithFiniteDifferences),
    "nystrom": (TestNystrom, TestNystromWithFiniteDifferences),
    "one_step": (TestOneStep, TestDarts),
    "soba": (TestSoba, TestSobaWithFiniteDifferences),
}
WITH_ONE_KIND_OF_PRODUCTS = {
    "betty-cg": TestBettyConjugateGradient,
    "betty-darts": TestBettyDarts,
    "betty-neumann": TestBettyNeumann,
    "darts": TestDarts,
    "first_order": TestFirstOrder,
    "penalty": TestPenalty,
    "unroll": TestUnroll,
}


def test_every_registered_engine_is_under_the_contract_with_each_kind_of_products():
    assert set(BY_AUTOGRAD_AND_DIFFERENCES) | set(WITH_ONE_KIND_OF_PRODUCTS) == set(
        mlo.available_engines()
    )
    for name, (exact, differences) in BY_AUTOGRAD_AND_DIFFERENCES.items():
        assert exact().make_engine().products.name == "autograd"
        assert differences().make_engine().products.name == "finite_difference"
        assert (
            type(exact().make_engine())
            is type(differences().make_engine())
            is type(mlo.engine_from(name))
        )
    for name, contract in WITH_ONE_KIND_OF_PRODUCTS.items():
        if name.startswith("betty-"):
            pytest.importorskip("betty", reason="betty-ml is not installed (make betty)")
        assert type(contract().make_engine()) is type(mlo.engine_from(name))


@pytest.mark.parametrize("name", mlo.testing.GRAPHS)
def test_the_sweep_that_stands_for_engines_equals_the_closed_forms(name):
    problem = mlo.testing.GRAPHS[name]()
    exact = problem.swept(lambda jacobian, v: torch.linalg.solve(jacobian.T, v))
    assert relative_error(exact, problem.exact) < 1e-12


def test_neumann_in_the_lowest_of_three_levels_is_differentiated_through_its_terms():
    problem = trilevel_quadratic()
    found = problem.optimizer({"w": {"name": "neumann", "num_terms": 100}, "m": "direct"}).gradient(
        "x"
    )["v"]
    assert relative_error(found, problem.exact) < 1e-8


@pytest.mark.parametrize(
    ("engine", "graph", "tolerance"),
    [
        (mlo.Neumann(num_terms=400), "weight decay", 1e-9),
        (mlo.Neumann(num_terms=400), "diamond", 1e-9),
        (mlo.Penalty(steps=150), "weight decay", 1e-7),
        (mlo.Penalty(steps=150), "diamond", 1e-6),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_series_converge_to_the_closed_form_with_a_step_size_of_their_own(engine, graph, tolerance):
    problem = mlo.testing.GRAPHS[graph]()
    assert (
        relative_error(problem.optimizer(engine).gradient(problem.upper)["v"], problem.exact)
        < tolerance
    )


@pytest.mark.parametrize(
    ("engine", "coupling"),
    [(mlo.Gmres(tol=1e-12), 0.5), (mlo.Gmres(tol=1e-12), 4.0), (mlo.Neumann(num_terms=700), 0.5)],
    ids=["gmres, weak", "gmres, strong", "neumann, weak"],
)
def test_games_are_solved_by_the_transposed_jacobian(engine, coupling):
    problem = bilinear_game(dim=4, coupling=coupling)
    assert relative_error(problem.optimizer(engine).gradient("x")["v"], problem.exact) < 1e-8
    jacobian = problem.jacobians["game"]  # the untransposed one would be far off
    assert relative_error(problem.swept(lambda a, v: torch.linalg.solve(a, v)), problem.exact) > 0.1
    assert float((jacobian - jacobian.T).norm()) > 0.1


# ------------------------------ one step against its own formula


@pytest.mark.parametrize("engine", ["one_step", "darts"])
def test_one_step_is_the_derivative_of_the_step_that_was_made(engine):
    problem = bilevel_quadratic(weight_decay=0.3)
    optimizer = problem.optimizer(engine)
    x = problem.value("x").clone().requires_grad_()
    w = problem.value("w").clone().requires_grad_()
    gradient = torch.autograd.grad(problem.losses["w"](w, x), w, create_graph=True)[0] + 0.3 * w
    moved = w - 0.1 * gradient
    (expected,) = torch.autograd.grad(problem.losses["x"](x, moved), x)
    assert relative_error(optimizer.gradient("x")["v"], expected) < 1e-8
    before = problem.value("x").clone()
    optimizer.step()  # SGD with lr 0.1 on x
    assert relative_error((before - problem.value("x")) / 0.1, expected) < 1e-8


def test_one_step_through_a_true_trilevel_problem_equals_plain_autograd():
    """w' is a step from w at (m, x); m' is a step down the total gradient of m's loss, which
    contains dw'/dm.
    """
    problem = trilevel_quadratic()
    optimizer = problem.optimizer("one_step")
    m, w, x = (problem.value(name).clone().requires_grad_() for name in ("m", "w", "x"))
    by_name = {p.name: p.loss for p in problem.problems}

    class Held:
        def __init__(self, v):
            self.v = v

    def step(value, loss):
        return value - 0.1 * torch.autograd.grad(loss, value, create_graph=True)[0]

    # The middle problem reads w's response, so its own total gradient goes through w's step.
    w_new = step(w, by_name["w"](Held(w), None, m=Held(m), x=Held(x)))
    m_new = step(m, by_name["m"](Held(m), None, w=Held(w_new), x=Held(x)))
    # The upper problem sees w as a function of the *response* of m.
    w_at = step(
        w, by_name["w"](Held(w), None, m=Held(m_at := m.detach().requires_grad_()), x=Held(x))
    )
    value = by_name["x"](Held(x), None, m=Held(m_new), w=Held(w_at))
    direct_x, v_m = torch.autograd.grad(value, [x, m_at], retain_graph=True)
    (through_m,) = torch.autograd.grad(m_new, x, v_m)
    assert relative_error(optimizer.gradient("x")["v"], direct_x + through_m) < 1e-10


def test_nonquadratic_trilevel_direct_equals_finite_differences_of_the_resolved_problem():
    """Third derivatives of the lowest loss matter here; the oracle solves all levels again at x ±
    e.
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


# ------------------------------ configuration


def test_engines_are_chosen_by_name_mapping_object_and_problem():
    problems = diamond().problems
    optimizer = mlo.MultilevelOptimizer(
        problems,
        hypergradient={
            "default": "darts",
            "gan": "first_order",
            "w2": {"name": "direct", "damping": 0.1},
            "w1": mlo.OneStep(),
        },
    )
    assert optimizer.engines["gan"] == mlo.FirstOrder()
    assert optimizer.engines["w2"] == mlo.Direct(damping=0.1)
    assert optimizer.engines["w1"] == mlo.OneStep()
    assert optimizer.engines["arch"] == mlo.darts()


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ("dart", ["dart", "Did you mean 'darts'"]),
        ({"default": "darts", "w3": "direct"}, ["'w3'", "Did you mean"]),
        ({"name": "direct", "dampening": 1.0}, ["'direct'", "dampening"]),
        ({"name": "direct", "products": "autograds"}, ["autograds", "Did you mean 'autograd'"]),
        (3, ["int"]),
        ({"w1": 3}, ["3"]),
    ],
)
def test_a_wrong_engine_is_refused_with_the_nearest_name(choice, words):
    with pytest.raises(mlo.EngineError) as caught:
        mlo.MultilevelOptimizer(diamond().problems, hypergradient=choice)
    assert all(word in str(caught.value) for word in words)


def test_a_third_party_engine_registers_by_name(monkeypatch):
    from mlo.hypergradient import registry

    monkeypatch.setattr(registry, "_FACTORIES", dict(registry._FACTORIES))
    mlo.register_engine("mine", lambda strength=1.0: mlo.Direct(damping=strength))
    assert mlo.engine_from({"name": "mine", "strength": 2.0}) == mlo.Direct(damping=2.0)
    with pytest.raises(mlo.EngineError, match="registered already"):
        mlo.register_engine("mine", mlo.Direct)


def test_an_installed_package_offers_engines_by_entry_point(monkeypatch):
    from importlib.metadata import EntryPoint

    from mlo.hypergradient import registry

    points = [
        EntryPoint("theirs", "mlo.hypergradient:Direct", registry.ENTRY_POINTS),
        EntryPoint("broken", "no_such_package:Engine", registry.ENTRY_POINTS),
        EntryPoint("cg", "mlo.hypergradient:Direct", registry.ENTRY_POINTS),
    ]
    monkeypatch.setattr(
        registry, "entry_points", lambda group: points if group == registry.ENTRY_POINTS else []
    )
    assert "theirs" in mlo.available_engines()
    assert mlo.engine_from({"name": "theirs", "damping": 2.0}) == mlo.Direct(damping=2.0)
    assert isinstance(mlo.engine_from("cg"), mlo.ConjugateGradient)
    with pytest.raises(
        mlo.EngineError, match="'broken' of no_such_package:Engine could not be imported"
    ):
        mlo.engine_from("broken")


@pytest.mark.parametrize("step", [0.0, -1.0, "dart"])
def test_a_wrong_difference_step_is_refused(step):
    with pytest.raises(mlo.EngineError, match="step must be"):
        mlo.FiniteDifference(step=step)


# ------------------------------ what cannot work is said before the first step


def test_a_finite_difference_engine_is_refused_where_its_response_is_differentiated_twice():
    with pytest.raises(mlo.EngineError, match=r"'w'.*differentiated twice.*'one_step'"):
        trilevel_quadratic().optimizer({"default": "one_step", "w": "darts"})
    with pytest.raises(mlo.EngineError, match=r"'m' contains the response of 'w'"):
        trilevel_quadratic().optimizer({"default": "one_step", "m": "darts"})


def test_a_compiled_problem_is_refused_where_its_engine_needs_double_backward():
    problem = bilevel_quadratic()
    lower = problem.problems[0]
    compiled = mlo.Problem(
        "w", module=lower.module, optimizer=lower.optimizers[""], loss=lower.loss, compile=True
    )
    with pytest.raises(mlo.EngineError, match=r"compiled.*'darts'"):
        mlo.MultilevelOptimizer([compiled, problem.problems[1]], hypergradient="one_step")


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


def test_a_gradient_that_is_zero_by_construction_is_said():
    optimizer = chain_of_three().optimizer("first_order")
    with pytest.warns(mlo.SolveWarning, match="gradient of problem 'x' is zero.*'one_step'"):
        optimizer.step()


def test_a_solver_on_finite_differences_warns():
    with pytest.warns(
        mlo.SolveWarning, match="'cg × finite_difference' solves with finite differences"
    ):
        bilevel_quadratic().optimizer(mlo.ConjugateGradient(products="finite_difference"))


def test_adamw_with_an_implicit_engine_warns():
    module, upper = nn.Linear(1, 1), nn.Linear(1, 1)
    problems = [
        mlo.Problem(
            "w",
            module=module,
            optimizer=torch.optim.AdamW(module.parameters(), weight_decay=0.1),
            loss=lambda w, _, *, x: (w.weight * x.weight).sum(),
        ),
        mlo.Problem(
            "x",
            module=upper,
            optimizer=torch.optim.SGD(upper.parameters(), lr=0.1),
            loss=lambda x, _, *, w: w.weight.sum(),
        ),
    ]
    with pytest.warns(mlo.SolveWarning, match="decoupled weight decay"):
        mlo.MultilevelOptimizer(problems, "direct")


def test_a_solve_that_does_not_converge_warns_once_and_is_in_every_record():
    problem = bilevel_quadratic(dtype=torch.float32)
    optimizer = problem.optimizer(mlo.Direct(tol=1e-30))
    with pytest.warns(mlo.SolveWarning, match=r"'direct' did not converge on problem 'w'"):
        first = optimizer.step()
    second = optimizer.step()  # a second warning would be an error here
    assert not first.solves["w"].converged
    assert not second.solves["w"].converged
    assert second.solves["w"].residual > 0


def test_fixing_solutions_takes_the_gradient_apart_by_what_flows_through_them():
    closed = diamond()
    optimizer = closed.optimizer("direct")
    q2 = torch.linalg.solve(closed.jacobians["w2"].T, closed.direct["w2"])

    def through(name):
        q = torch.linalg.solve(closed.jacobians[name].T, -closed.mixed["w2"][name].T @ q2)
        return -closed.mixed[name]["arch"].T @ q

    expected = {
        ("w1", "gan", "w2"): closed.direct["arch"],
        ("w1", "gan"): closed.direct["arch"] - closed.mixed["w2"]["arch"].T @ q2,
        ("gan",): closed.exact - through("gan"),
        ("w1",): closed.exact - through("w1"),
        (): closed.exact,
    }
    for fixed, gradient in expected.items():
        assert relative_error(optimizer.gradient("arch", fixed=fixed)["v"], gradient) < 1e-12
    with pytest.raises(mlo.GraphError, match="no problem 'w3'"):
        optimizer.gradient("arch", fixed=("w3",))


def test_first_order_drops_only_the_problem_it_is_chosen_for():
    closed: ClosedForm = chain_of_three()
    with pytest.warns(mlo.SolveWarning, match="'first_order' of w1"):
        cut = closed.optimizer({"default": "direct", "w1": "first_order"}).gradient("x")["v"]
    assert torch.equal(cut, torch.zeros_like(cut))
