"""A lower problem whose solution stands at a kink: the lasso, against the re-solved problem."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso

import mlo
from mlo.hypergradient.kinks import find_kink
from mlo.testing import Vector

GENERATOR = np.random.default_rng(0)
X, X_VALID = GENERATOR.normal(size=(40, 10)), GENERATOR.normal(size=(30, 10))
TRUTH = np.array([2.0, -1.5, 1.0, 0, 0, 0, 0, 0, 0, 0])
Y, Y_VALID = X @ TRUTH + 0.3 * GENERATOR.normal(size=40), X_VALID @ TRUTH
T, T_VALID = torch.tensor(X), torch.tensor(X_VALID)


def solved(log_penalty):
    lasso = Lasso(alpha=float(np.exp(log_penalty)), fit_intercept=False, tol=1e-14, max_iter=10**6)
    return torch.tensor(lasso.fit(X, Y).coef_)


def upper_value(log_penalty):
    return float(((T_VALID @ solved(log_penalty) - torch.tensor(Y_VALID)) ** 2).mean())


def gradient(engine, *, masked):
    w, penalty = Vector(solved(-1.5)), Vector(torch.tensor(-1.5).double())
    active = (w.v != 0).double().detach() if masked else 1.0
    problems = [
        mlo.Problem(
            "w",
            module=w,
            optimizer=torch.optim.SGD(w.parameters(), lr=0.0),
            loss=lambda w, _, *, penalty: (
                0.5 * ((T @ (w.v * active) - torch.tensor(Y)) ** 2).mean()
                + penalty.v.exp() * (w.v * active).abs().sum()
            ),
        ),
        mlo.Problem(
            "penalty",
            module=penalty,
            optimizer=torch.optim.SGD(penalty.parameters(), lr=0.0),
            loss=lambda penalty, _, *, w: (
                (T_VALID @ (w.v * active) - torch.tensor(Y_VALID)) ** 2
            ).mean(),
        ),
    ]
    optimizer = mlo.MultilevelOptimizer(problems, {"name": engine, "tol": 1e-10})
    return float(optimizer.gradient("penalty")["v"])


@pytest.mark.parametrize("engine", ["cg", "minres", "direct"])
def test_a_lasso_is_warned_of(engine):
    with pytest.warns(mlo.SolveWarning, match=r"entries of 'v' are exactly 0.*active set"):
        gradient(engine, masked=False)


@pytest.mark.parametrize("engine", ["cg", "minres"])
def test_the_active_set_in_both_losses_is_exact(engine):
    e = 1e-5
    exact = (upper_value(-1.5 + e) - upper_value(-1.5 - e)) / (2 * e)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gradient(engine, masked=True) == pytest.approx(exact, rel=1e-4)


@pytest.mark.parametrize(
    ("theta", "f", "found"),
    [
        ([0.0, 1.0, 2.0], [1.0, 1e-6, -1e-6], True),
        ([0.0, 1.0, 2.0], [1.0, 0.5, -0.5], False),
        ([0.0, 0.0, 0.0], [1.0, 1.0, 1.0], False),
        ([3.0, 1.0, 2.0], [1.0, 1e-6, -1e-6], False),
        ([0.0, 1.0, 2.0], [float("nan"), 1e-6, -1e-6], False),
    ],
    ids=["kink", "not solved", "a new bias", "no zeros", "lost"],
)
def test_a_kink_is_told_from_its_like(theta, f, found):
    gradients = [torch.tensor(f)]
    assert bool(find_kink(["w"], [torch.tensor(theta)], lambda: gradients)) == found
