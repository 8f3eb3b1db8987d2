"""The contract that every registered engine keeps, with each kind of products."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import mlo
import mlo.testing
from mlo.testing import EngineContract, bilevel_quadratic, diamond

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


@pytest.mark.filterwarnings("ignore:A gradient goes through 1 of the")  # before a round
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


def least_squares(matrix, v, steps):
    """The x in span{Mᵀv, (MᵀM)Mᵀv, …} with the least ‖v − Mx‖."""
    start, square = matrix.T @ v, matrix.T @ matrix
    columns = [start]
    for _ in range(steps - 1):
        columns.append(square @ columns[-1])
    basis, _ = torch.linalg.qr(torch.stack(columns, 1))
    return basis @ torch.linalg.lstsq(matrix @ basis, v.unsqueeze(1)).solution.squeeze(1)


@pytest.mark.filterwarnings(*KNOWN_WARNINGS)
class TestNormalConjugateGradient(Exact):
    tolerance = 1e-8

    def make_engine(self):
        return mlo.NormalConjugateGradient(tol=1e-12, max_steps=60)


@pytest.mark.filterwarnings(*KNOWN_WARNINGS)
class TestTruncatedNormalConjugateGradient(EngineContract):
    def make_engine(self):
        return mlo.NormalConjugateGradient(max_steps=2)

    def inverse(self, jacobian, v):
        steps = 1 if is_multiple(jacobian) else 2
        return least_squares(jacobian.T, v, steps)


@pytest.mark.filterwarnings(*KNOWN_WARNINGS)
class TestSid(EngineContract):
    """On one batch its steps sum the Neumann series, with a factor for each step's size."""

    def make_engine(self):
        return mlo.Sid(steps=5, step_size=0.3, decay=0.5)

    def inverse(self, jacobian, v):
        q = torch.zeros_like(v)
        for step in range(5):
            q = q + 0.3 / (1 + 0.5 * step) * (v - jacobian.T @ q)
        return q


class TestOuterProduct(EngineContract):
    """At a solution its gradient is rounding, of which a large damping leaves nothing.

    Its formula elsewhere is in test_outer_product.py.
    """

    def make_engine(self):
        return mlo.OuterProduct(damping=1e9)

    def inverse(self, jacobian, v):
        return torch.zeros_like(v)


class TestZerothOrder(OneStepOfSgd):
    """With a basis of orthogonal directions a linear response is exact."""

    tolerance = 1e-7
    tolerance_float32 = 2e-3

    def make_engine(self):
        return mlo.ZerothOrder(samples=16)


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


class TestBettySama(TestBettyDarts):
    """With SGD, as here. With Adam: `tests/oracle/test_betty_programs.py`."""

    def make_engine(self):
        return mlo.engine_from({"name": "betty-sama", "alpha": 0.01})


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

TestNormalConjugateGradientWithFiniteDifferences = with_finite_differences(
    TestNormalConjugateGradient
)

TestSidWithFiniteDifferences = with_finite_differences(TestSid)

TestNystromWithFiniteDifferences = with_finite_differences(TestNystrom)

TestSobaWithFiniteDifferences = with_finite_differences(TestSoba)

BY_AUTOGRAD_AND_DIFFERENCES = {
    "cg": (TestConjugateGradient, TestConjugateGradientWithFiniteDifferences),
    "direct": (TestDirect, TestDirectWithFiniteDifferences),
    "gmres": (TestGmres, TestGmresWithFiniteDifferences),
    "identity": (TestIdentity, TestIdentityWithFiniteDifferences),
    "minres": (TestMinres, TestMinresWithFiniteDifferences),
    "neumann": (TestNeumann, TestNeumannWithFiniteDifferences),
    "normal_cg": (
        TestNormalConjugateGradient,
        TestNormalConjugateGradientWithFiniteDifferences,
    ),
    "nystrom": (TestNystrom, TestNystromWithFiniteDifferences),
    "one_step": (TestOneStep, TestDarts),
    "sid": (TestSid, TestSidWithFiniteDifferences),
    "soba": (TestSoba, TestSobaWithFiniteDifferences),
}

WITH_ONE_KIND_OF_PRODUCTS = {
    "betty-cg": TestBettyConjugateGradient,
    "betty-darts": TestBettyDarts,
    "betty-neumann": TestBettyNeumann,
    "betty-sama": TestBettySama,
    "darts": TestDarts,
    "first_order": TestFirstOrder,
    "outer_product": TestOuterProduct,
    "penalty": TestPenalty,
    "unroll": TestUnroll,
    "zeroth_order": TestZerothOrder,
}


def test_every_registered_engine_is_under_the_contract():
    """Every registered engine is under the contract with each kind of products."""
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
