"""`identity`: the Jacobian is taken for the identity."""

from __future__ import annotations

import torch
from quadratics import POSITIVE, quadratic

import mlo
from mlo.testing import bilevel_quadratic, relative_error


def test_the_implicit_term_is_one_mixed_product():
    optimizer, b, v = quadratic(POSITIVE, "identity")
    assert relative_error(optimizer.gradient("x")["v"], b.T @ v) < 1e-14


def test_it_is_one_step_with_a_learning_rate_of_one():
    closed = bilevel_quadratic()
    for parameters in closed.problems[0].optimizers["w"].param_groups:
        parameters["lr"] = 1.0
    one_step = closed.optimizer("one_step").gradient("x")["v"]
    assert relative_error(closed.optimizer("identity").gradient("x")["v"], one_step) < 1e-12


def test_it_solves_nothing():
    optimizer, *_ = quadratic(POSITIVE, mlo.Identity())
    report = optimizer.step().solves["w"]
    assert (report.engine, report.iterations, report.residual) == ("identity", 0, None)


def test_it_serves_a_jacobian_that_is_singular():
    optimizer, b, v = quadratic(torch.zeros_like(POSITIVE), "identity")
    assert relative_error(optimizer.gradient("x")["v"], b.T @ v) < 1e-14
