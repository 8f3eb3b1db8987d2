"""`sid`: a linear solve by stochastic steps, each on its own batch."""

from __future__ import annotations

import itertools

import pytest
import torch
from quadratics import DIM, POSITIVE, quadratic

import mlo
from mlo.testing import Vector, relative_error

GENERATOR = torch.Generator().manual_seed(3)
POOL = [
    (POSITIVE + 0.2 * torch.diag(row[:DIM]), row[DIM:].view(DIM, 3))
    for row in torch.randn(3, DIM + 3 * DIM, generator=GENERATOR, dtype=torch.float64)
]
"""Batches: each is an A, [DIM, DIM], and a B, [DIM, 3]."""

V = torch.randn(DIM, generator=GENERATOR, dtype=torch.float64)
ALPHA = 0.4


def on_batches(engine, batches, *, upper_loss=None, **options):
    """The lower loss ½ wᵀA_jw − wᵀB_jx on batch j, and the upper one wᵀv."""
    w, x = Vector(torch.zeros(DIM).double()), Vector(torch.zeros(3).double())
    lower = mlo.Problem(
        "w",
        module=w,
        optimizer=torch.optim.SGD(w.parameters(), lr=0.0),
        loss=lambda w, batch, *, x: 0.5 * w.v @ batch[0] @ w.v - w.v @ (batch[1] @ x.v),
        data=POOL[:1],
        solve_data=batches,
        solve_batches=len(batches),
        **options,
    )
    upper = mlo.Problem(
        "x",
        module=x,
        optimizer=torch.optim.SGD(x.parameters(), lr=0.0),
        loss=upper_loss or (lambda x, _, *, w: w.v @ V),
    )
    return mlo.MultilevelOptimizer([lower, upper], engine)


def naive(for_steps, for_b, *, steps, decay=0.0, damping=0.0):
    """The steps written out, over the batches in turn."""
    q = torch.zeros_like(V)
    for step in range(steps):
        a, _ = for_steps[step % len(for_steps)]
        q = q + ALPHA / (1 + decay * step) * (V - a @ q - damping * q)
    return torch.stack([b.T @ q for _, b in for_b]).mean(0)


@pytest.mark.parametrize("products", ["autograd", "finite_difference"])
@pytest.mark.filterwarnings("ignore:.*solves with finite differences")
def test_each_step_is_on_a_batch_of_its_own_and_b_on_others(products):
    batches = [POOL[k] for k in (0, 1, 2, 1, 0, 2)]
    engine = mlo.Sid(
        steps=4, mixed_batches=2, step_size=ALPHA, decay=0.7, damping=0.1, products=products
    )
    expected = naive(batches[:4], batches[4:], steps=4, decay=0.7, damping=0.1)
    found = on_batches(engine, batches).gradient("x")["v"]
    assert relative_error(found, expected) < (1e-14 if products == "autograd" else 1e-6)


def test_too_few_batches_are_taken_in_turn():
    batches = [POOL[0], POOL[1], POOL[2]]
    optimizer = on_batches(mlo.Sid(steps=5, step_size=ALPHA), batches)
    expected = naive(batches[:2], batches[2:], steps=5)
    assert relative_error(optimizer.gradient("x")["v"], expected) < 1e-14


def test_its_mean_is_the_truncated_series_of_the_mean():
    """Over all sequences of independent batches, each as likely as any other.

    A solve on the same batches together has another mean.
    """
    found, solved = [], []
    for drawn in itertools.product(POOL, repeat=3):
        engine = mlo.Sid(steps=2, step_size=ALPHA)
        found.append(on_batches(engine, list(drawn)).gradient("x")["v"])
        solved.append(on_batches("direct", list(drawn)).gradient("x")["v"])
    mean_a, mean_b = (torch.stack(parts).mean(0) for parts in zip(*POOL, strict=True))
    q = ALPHA * V + ALPHA * (V - mean_a @ (ALPHA * V))
    assert relative_error(torch.stack(found).mean(0), mean_b.T @ q) < 1e-14
    exact = mean_b.T @ torch.linalg.solve(mean_a, V)
    assert relative_error(torch.stack(solved).mean(0), exact) > 1e-3


def test_on_one_batch_it_is_the_neumann_series():
    for options in ({}, {"solve_data": [None, None], "solve_batches": 2}):
        engine = mlo.Sid(steps=6, step_size=0.3)
        optimizer, *_ = quadratic(POSITIVE, engine, **options)
        series, *_ = quadratic(POSITIVE, mlo.Neumann(num_terms=6, step_size=0.3, tol=1.0))
        assert relative_error(optimizer.gradient("x")["v"], series.gradient("x")["v"]) < 1e-14


def test_with_its_own_step_size_it_converges():
    options = {"solve_data": [None, None], "solve_batches": 2}
    optimizer, b, v = quadratic(POSITIVE, mlo.Sid(steps=300), **options)
    expected = b.T @ torch.linalg.solve(POSITIVE, v)
    assert relative_error(optimizer.gradient("x")["v"], expected) < 1e-5


def test_a_larger_curvature_shortens_the_next_solves_steps():
    """The first batch has a tenth of the others' curvature: the steps diverge once, and recover."""
    large = [(10.0 * POOL[0][0], POOL[0][1])] * 20
    optimizer = on_batches(mlo.Sid(steps=20), [POOL[0], *large])
    with pytest.warns(mlo.SolveWarning, match="The steps diverge"):
        assert optimizer.step().solves["w"].failed
    assert optimizer.step().solves["w"].outcome == "truncated"


def test_a_warm_start_continues():
    engine = mlo.Sid(steps=3, step_size=ALPHA, warm_start=True)
    batches = [POOL[k] for k in (0, 1, 2, 0)]
    optimizer = on_batches(engine, batches)
    optimizer.step()
    expected = naive(batches[:3], batches[3:], steps=6)
    assert relative_error(optimizer.gradient("x")["v"], expected) < 1e-14


def test_it_is_differentiated_as_the_series_is():
    """In the middle of three levels, with the graphs of several batches."""

    def total(engine, **options):
        w, m, x = (Vector(torch.linspace(0.1, 0.9, 3).double() * k) for k in (1.0, 0.7, -0.4))
        a = POSITIVE[:3, :3]

        def problem(name, module, loss, **more):
            optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
            return mlo.Problem(name, module=module, optimizer=optimizer, loss=loss, **more)

        def w_loss(w, _, *, m, x):
            return 0.5 * w.v @ a @ w.v - (w.v * m.v * x.v.exp()).sum() + 0.1 * (w.v**4).sum()

        def m_loss(m, _, *, w, x):
            return (m.v - x.v).pow(2).sum() + (w.v * m.v).sin().sum()

        def x_loss(x, _, *, m, w):
            return (m.v.cos() * w.v).sum() + x.v.pow(2).sum()

        problems = [
            problem("w", w, w_loss, **options),
            problem("m", m, m_loss),
            problem("x", x, x_loss),
        ]
        return mlo.MultilevelOptimizer(problems, {"w": engine, "m": "one_step"}).gradient("x")["v"]

    series = total(mlo.Neumann(num_terms=4, step_size=ALPHA, tol=1.0))
    found = total(mlo.Sid(steps=4, step_size=ALPHA), solve_data=[None] * 5, solve_batches=5)
    assert relative_error(found, series) < 1e-13


def test_fixed_points_of_projected_steps_are_solved_on_batches():
    """On batches that are alike: as the Neumann series on one."""

    def total(engine, **options):
        return quadratic(
            POSITIVE,
            engine,
            lr=0.5,
            after_step=lambda parameters, *, x: {"v": 0.5 * parameters["v"] + x.v.sum()},
            **options,
        )[0].gradient("x")["v"]

    series = total(mlo.Neumann(num_terms=4, step_size=ALPHA, tol=1.0))
    options = {"solve_data": [None] * 5, "solve_batches": 5}
    found = total(mlo.Sid(steps=4, step_size=ALPHA), **options)
    assert relative_error(found, series) < 1e-13
