"""Products with the derivatives of a stationarity map, and the base of all engines."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from quadratics import POSITIVE, quadratic

import mlo
from mlo.hypergradient import Solve
from mlo.testing import Vector, bilinear_game, relative_error

THETA = [torch.full((4,), 3.0, dtype=torch.float64), torch.zeros(2, dtype=torch.float64)]
DIRECTION = [torch.full((4,), 0.5, dtype=torch.float64), torch.ones(2, dtype=torch.float64)]


def ones(length):
    return torch.ones(length, dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class Halved(mlo.Engine):
    """q = v / 2, as a user would write it."""

    name: ClassVar[str] = "halved"

    def solve(self, system, cotangent):
        return Solve(q=[v / 2 for v in cotangent], report=self.report(system.problem))


@dataclass(frozen=True, kw_only=True)
class Stationarity(mlo.Engine):
    """Keeps F and products with Aᵀ and A of the last solve; v is a vector of ones."""

    name: ClassVar[str] = "stationarity"
    seen: ClassVar[dict] = {}

    def solve(self, system, cotangent):
        v = [torch.ones_like(t) for t in system.parameters]
        generator = torch.Generator().manual_seed(7)
        u, w = ([torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in v] for _ in "uw")
        of = {
            "F": system.gradient(),
            "product": system.transpose_product(v),
            "A v": system.product(v),
            "u": u,
            "w": w,
            "A u": system.product(u),
            "A^T w": system.transpose_product(w),
        }
        for name, parts in of.items():
            self.seen[name] = torch.cat([part.flatten() for part in parts])
        return Solve(q=list(cotangent), report=self.report(system.problem))


@pytest.mark.parametrize("step", [0.0, -1.0, "dart"])
def test_a_wrong_difference_step_is_refused(step):
    with pytest.raises(mlo.EngineError, match="step must be"):
        mlo.FiniteDifference(step=step)


@pytest.mark.parametrize(("step", "radius"), [("darts", 0.01), (0.5, 0.5)])
def test_a_radius_is_divided_by_the_directions_norm(step, radius):
    norm = math.sqrt(4 * 0.25 + 2)
    found = mlo.FiniteDifference(step=step).step_size(THETA, DIRECTION, torch.float64)
    assert found == pytest.approx(radius / norm)


def test_the_adaptive_step_moves_no_tensor_too_far():
    """The adaptive step moves no tensor by more than its share.

    The second tensor is zero, and is given entries of 0.01.
    """
    found = mlo.FiniteDifference().step_size(THETA, DIRECTION, torch.float64)
    ratio = 0.01 * math.sqrt(2) / math.sqrt(2)
    assert found == pytest.approx(math.cbrt(torch.finfo(torch.float64).eps) * ratio)


@pytest.mark.parametrize("step", ["adaptive", "darts", 1.0])
def test_a_direction_of_zeros_moves_nothing(step):
    still = [torch.zeros_like(t) for t in DIRECTION]
    assert mlo.FiniteDifference(step=step).step_size(THETA, still, torch.float64) == 0.0


@pytest.mark.parametrize("products", ["autograd", "finite_difference"])
def test_products_are_those_of_the_stationarity_map(products):
    """The transposed Jacobian of a game is no symmetric matrix."""
    closed = bilinear_game()
    closed.optimizer(Stationarity(products=products)).gradient("x")
    jacobian = closed.jacobians["game"]
    found = Stationarity.seen["product"]
    expected = jacobian.T @ torch.ones(len(jacobian), dtype=torch.float64)
    assert relative_error(found, expected) < 1e-8
    assert float(Stationarity.seen["F"].norm()) < 1e-12  # at the equilibrium
    expected = jacobian @ torch.ones(len(jacobian), dtype=torch.float64)
    assert relative_error(Stationarity.seen["A v"], expected) < 1e-8


@pytest.mark.parametrize(
    ("products", "tolerance"), [("autograd", 1e-13), ("finite_difference", 1e-7)]
)
def test_products_with_the_jacobian_are_right_through_norms(products, tolerance):
    """⟨Aᵀ w, u⟩ = ⟨w, A u⟩, with a player whose gradient is a constant and with weight decay."""
    torch.manual_seed(0)
    body = torch.nn.Sequential(
        torch.nn.Linear(4, 6), torch.nn.LayerNorm(6), torch.nn.Tanh(), torch.nn.BatchNorm1d(6)
    )
    game = torch.nn.ModuleDict(
        {"body": body, "head": torch.nn.Linear(6, 2), "flat": Vector(ones(3))}
    )
    game.double()
    x = torch.randn(8, 4, dtype=torch.float64)

    def losses(game, _, *, upper):
        out = game["head"](game["body"](x))
        fit = (out - upper.v).pow(2).mean()
        return {
            "body": fit + out.exp().mean(),
            "head": 2.0 * out.sin().sum() - fit,
            "flat": game["flat"].v.sum(),
        }

    problems = [
        mlo.Problem(
            "game",
            module=game,
            optimizer=torch.optim.SGD(game.parameters(), lr=0.1, weight_decay=0.3),
            loss=losses,
            players={"body": "body", "head": "head", "flat": "flat"},
        ),
        mlo.Problem(
            "upper",
            module=(upper := Vector(ones(2))),
            optimizer=torch.optim.SGD(upper.parameters(), lr=0.1),
            loss=lambda upper, _, *, game: sum(p.pow(2).sum() for p in game.parameters()),
        ),
    ]
    mlo.MultilevelOptimizer(problems, Stationarity(products=products)).gradient("upper")
    seen = Stationarity.seen
    left, right = seen["A^T w"] @ seen["u"], seen["w"] @ seen["A u"]
    assert float((left - right).abs() / left.abs()) < tolerance
    # Of a symmetric A this would be the same.
    assert float((seen["A v"] - seen["product"]).norm()) > 0.1 * float(seen["A v"].norm())


def test_an_engine_of_ones_own_says_how_q_is_found():
    optimizer, b, v = quadratic(POSITIVE, Halved())
    assert relative_error(optimizer.gradient("x")["v"], b.T @ v / 2) < 1e-14
    assert optimizer.step().solves["w"].engine == "halved"


def test_the_products_of_an_engine_are_a_choice_by_name():
    engine = Halved(products={"name": "finite_difference", "step": 0.1})
    assert engine.products == mlo.FiniteDifference(step=0.1)
    assert engine.label == "halved × finite_difference"
    assert not engine.differentiable
    assert Halved().label == "halved"
    assert Halved().differentiable


@pytest.mark.parametrize(
    ("products", "words"),
    [
        ("autogrd", "Did you mean 'autograd'"),
        ({"name": "autograd", "step": 1.0}, "do not take these options"),
    ],
)
def test_unknown_products_are_refused(products, words):
    with pytest.raises(mlo.EngineError, match=words):
        Halved(products=products)


# ------------------------------ problems that are maximized

ENGINES = [
    {"name": "cg", "tol": 1e-12, "damping": 0.1},
    {"name": "minres", "tol": 1e-12, "damping": 0.1},
    {"name": "gmres", "products": "finite_difference"},
    {"name": "neumann", "num_terms": 5},
    {"name": "nystrom", "rank": 3},
    {"name": "sid", "steps": 5, "step_size": 0.1},
    {"name": "soba", "step_size": 0.1},
    {"name": "penalty"},
    {"name": "direct", "damping": 0.1},
    {"name": "identity", "products": "finite_difference"},
    "identity",
    "outer_product",
]


def climbing(engine, sign, *, levels=2):
    """The gradient in h above a problem that minimizes L, or maximizes −L."""
    w, m, h = (Vector(torch.tensor(v).double()) for v in ([1.0, 0.5], [0.3, -0.2], [0.2, 0.4]))

    def lowest(w, _, *, h):
        return sign * (w.v.pow(4).sum() + (w.v * h.v).sum() + w.v.pow(2).sum())

    def between(m, _, *, w, h):
        return sign * ((m.v * w.v).sin().sum() + m.v.pow(2).sum() + (m.v * h.v).sum())

    def highest(h, _, **lower):
        return sum((module.v - 1.0).pow(2).sum() for module in lower.values())

    def sgd(module):
        parameters = module.parameters()
        return torch.optim.SGD(parameters, lr=0.0, weight_decay=0.2, maximize=sign < 0.0)

    names = ["w", "m", "h"][3 - levels :] if levels == 3 else ["w", "h"]
    problems = {
        "w": mlo.Problem("w", module=w, optimizer=sgd(w), loss=lowest, solve_data=[None]),
        "m": mlo.Problem("m", module=m, optimizer=sgd(m), loss=between),
        "h": mlo.Problem(
            "h",
            module=h,
            optimizer=torch.optim.SGD(h.parameters(), lr=0.0),
            loss=highest,
            reads=names[:-1],
        ),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of differences, and of few terms that do not converge
        optimizer = mlo.MultilevelOptimizer([problems[name] for name in names], engine)
        for _ in range(3):
            optimizer.step()
        return optimizer.gradient("h")["v"]


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_maximizing_a_loss_is_minimizing_its_negative(engine):
    assert relative_error(climbing(engine, -1.0), climbing(engine, 1.0)) < 1e-8


@pytest.mark.parametrize("engine", ["identity", {"name": "neumann", "num_terms": 3}])
def test_maxima_below_maxima_are_minima_below_minima(engine):
    found, expected = climbing(engine, -1.0, levels=3), climbing(engine, 1.0, levels=3)
    assert relative_error(found, expected) < 1e-10


def test_a_player_of_a_game_may_maximize():
    # a minimizes, and b maximizes, 2ab + a² − b² + x a + y b.
    def solved(engine):
        game = torch.nn.ModuleDict({key: Vector(torch.zeros(1).double()) for key in "ab"})
        x = Vector(torch.ones(2).double())

        def both(game, _, *, x):
            a, b, (one, other) = game["a"].v, game["b"].v, x.v
            loss = (2.0 * a * b + a.pow(2) - b.pow(2) + one * a + other * b).sum()
            return {"a": loss, "b": loss}

        problem = mlo.Problem(
            "game",
            module=game,
            players={"a": "a", "b": "b"},
            optimizer={
                "a": torch.optim.SGD(game["a"].parameters(), lr=0.0),
                "b": torch.optim.SGD(game["b"].parameters(), lr=0.0, maximize=True),
            },
            loss=both,
        )
        up = mlo.Problem(
            "x",
            module=x,
            optimizer=torch.optim.SGD(x.parameters(), lr=0.0),
            loss=lambda x, _, *, game: game["a"].v.sum() + 3.0 * game["b"].v.sum(),
        )
        return mlo.MultilevelOptimizer([problem, up], engine).gradient("x")["v"]

    # F = (2 a + 2 b + x, 2 b − 2 a − y), whose Jacobian has the eigenvalues 2 ± 2i.
    series = {"name": "neumann", "num_terms": 200, "step_size": 0.25}
    assert relative_error(solved(series), solved("direct")) < 1e-6
