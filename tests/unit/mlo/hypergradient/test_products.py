"""Products with the derivatives of a stationarity map, and the base of all engines."""

from __future__ import annotations

import math
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
