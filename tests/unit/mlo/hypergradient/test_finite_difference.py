"""Products by finite differences of first gradients: their step, and what they equal."""

from __future__ import annotations

import math

import pytest
import torch

import mlo
from mlo.testing import bilevel_quadratic, relative_error


@pytest.mark.parametrize("step", ["adaptive", "darts", 0.1])
def test_they_are_exact_on_a_quadratic(step):
    products = {"name": "finite_difference", "step": step}
    found = bilevel_quadratic().optimizer({"name": "one_step", "products": products})
    exact = bilevel_quadratic().optimizer("one_step")
    assert relative_error(found.gradient("x"), exact.gradient("x")) < 1e-6


@pytest.mark.parametrize("step", ["other", 0.0, -1.0])
def test_another_step_is_refused(step):
    with pytest.raises(mlo.EngineError, match="step must be"):
        mlo.FiniteDifference(step=step)


def test_the_adaptive_step_moves_no_tensor_too_far():
    """The adaptive step moves no tensor by more than its share."""
    theta = [torch.full((4,), 2.0).double(), torch.full((2,), 100.0).double()]
    u = [torch.ones(4).double(), torch.ones(2).double()]
    e = mlo.FiniteDifference().step_size(theta, u, torch.float64)
    share = math.cbrt(torch.finfo(torch.float64).eps)
    assert e == pytest.approx(share * 4.0 / 2.0)
    assert mlo.FiniteDifference().step_size(theta, [0 * t for t in u], torch.float64) == 0.0


def test_the_step_of_darts_is_a_hundredth_of_the_directions_norm():
    u = [torch.full((4,), 3.0)]
    e = mlo.FiniteDifference(step="darts").step_size([torch.zeros(4)], u, torch.float32)
    assert e == pytest.approx(0.01 / 6.0)


def test_displaced_points_stay_in_their_memory():
    """From one product to the next, unless the parameters are of another dtype then."""
    optimizer = bilevel_quadratic(dtype=torch.float32).optimizer("darts")
    losses = optimizer._history.losses
    optimizer.step()
    first = dict(losses["w"].displaced)
    optimizer.step()
    assert first and all(losses["w"].displaced[key] is tensor for key, tensor in first.items())
    losses["w"].displaced = {key: tensor.double() for key, tensor in first.items()}
    optimizer.step()
    assert all(tensor.dtype == torch.float32 for tensor in losses["w"].displaced.values())
