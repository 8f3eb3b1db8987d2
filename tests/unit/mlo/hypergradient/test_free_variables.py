"""A solve on the free variables solves the whole, unsymmetric system."""

from __future__ import annotations

import pytest
import torch

import mlo
from mlo import constraints
from mlo.advice import EngineAdvice
from mlo.hypergradient import ConjugateGradient
from mlo.testing import Vector

H = torch.tensor([[2.0, 0.6, 0.1], [0.6, 1.5, 0.3], [0.1, 0.3, 1.0]], dtype=torch.float64)
V = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


class Watched(ConjugateGradient):
    """Keeps the system and the q of its last solve."""

    def solve(self, system, cotangent):
        found = super().solve(system, cotangent)
        v = [t.clone() for t in cotangent]
        left = system.transpose_product(found.q)
        object.__setattr__(self, "left", (left[0].detach(), v[0].detach(), found.q[0].detach()))
        return found


def optimizer(after_step, engine):
    w, x = Vector(torch.tensor([0.3, 0.2, 0.4]).double()), Vector(torch.ones(3).double())
    lower = mlo.Problem(
        "w",
        module=w,
        optimizer=torch.optim.SGD(w.parameters(), lr=0.3),
        loss=lambda w, _, *, x: 0.5 * w.v @ H @ w.v - w.v @ (x.v * V),
        after_step=after_step,
        steps=200,
    )
    upper = mlo.Problem(
        "x",
        module=x,
        optimizer=torch.optim.SGD(x.parameters(), lr=0.0),
        loss=lambda x, _, *, w: w.v @ torch.tensor([3.0, 1.0, -2.0]).double(),
    )
    return mlo.MultilevelOptimizer([lower, upper], engine)


@pytest.mark.parametrize(
    "after_step",
    [
        constraints.nonnegative,
        lambda p: {"v": constraints.simplex(p["v"])},
        lambda p: {"v": constraints.box(p["v"], -0.1, 0.1)},  # nothing is free
        lambda p: {"v": p["v"]},  # all is
        lambda p: {},
    ],
    ids=["nonnegative", "simplex", "nothing free", "all free", "left out"],
)
def test_q_solves_the_unsymmetric_system(after_step):
    engine = Watched(tol=1e-13)
    optimizer(after_step, engine).step()
    product, v, _ = engine.left
    torch.testing.assert_close(product, v, atol=1e-11, rtol=0)


@pytest.mark.parametrize(
    "after_step",
    [
        lambda p: {"v": constraints.l2_ball(p["v"], 0.2)},
        lambda p: {"v": 0.5 * p["v"]},  # symmetric, but no projector
        lambda p: {"v": torch.stack([p["v"][0], p["v"][0], p["v"][2]])},  # a projector, askew
    ],
    ids=["ball", "shrunk", "askew"],
)
def test_what_is_no_orthogonal_projector_is_refused(after_step):
    with pytest.raises(mlo.EngineError, match="not an orthogonal projector"):
        optimizer(after_step, "cg").step()


def test_a_refusal_advises_only_engines_that_serve():
    made = optimizer(lambda p: {"v": 0.5 * p["v"]}, "cg")
    for loss in made._history.losses.values():
        loss.advice = EngineAdvice(serves=lambda name: name == "neumann")
    with pytest.raises(mlo.EngineError, match=r"orthogonal projector: use 'neumann'\.$"):
        made.step()
