"""Step sizes of iterations on A, against its eigenvalues."""

from __future__ import annotations

import math

import pytest
import torch

from mlo.hypergradient.step_size import (
    REFRESH,
    inverse_step_size,
    largest_inverse_step_size,
    persistent_step_size,
)


class Operator:
    """u ↦ Aᵀ u of one parameter."""

    def __init__(self, matrix):
        self.matrix, self.products = matrix, 0

    def __call__(self, u):
        self.products += 1
        return self.matrix.T @ u

    def flatten(self, parts):
        return torch.cat([part.reshape(-1) for part in parts])


class System:
    """The memory of an engine, and the one parameter."""

    names = ("v",)

    def __init__(self, size):
        self.parameters = [torch.zeros(size, dtype=torch.float64)]
        self.memory = {}

    def recall(self, what):
        return self.memory.get(what)

    def keep(self, what, value):
        self.memory[what] = value


def diagonal(*entries):
    return torch.diag(torch.tensor(entries, dtype=torch.float64))


def rotation(real, imaginary):
    """A 2 x 2 matrix with eigenvalues real ± i imaginary."""
    return torch.tensor([[real, -imaginary], [imaginary, real]], dtype=torch.float64)


def test_of_an_eigenvector_it_is_the_eigenvalue():
    u = torch.tensor([0.0, 2.0], dtype=torch.float64)
    assert inverse_step_size(u, diagonal(1.0, 7.0) @ u) == pytest.approx(7.0)
    assert inverse_step_size(u, torch.zeros_like(u)) == 0.0


@pytest.mark.parametrize("imaginary", [0.5, 3.0])
def test_at_a_spiral_the_iteration_decays_fastest(imaginary):
    """1 − αλ is least in modulus at α = Re λ / |λ|²; at 1 / |λ| a spiral may grow."""
    matrix, u = rotation(1.0, imaginary), torch.tensor([1.0, 0.0], dtype=torch.float64)
    alpha = 1.0 / inverse_step_size(u, matrix.T @ u)
    decay = abs(1.0 - alpha * complex(1.0, imaginary))
    assert decay < 1.0
    for other in (0.9 * alpha, 1.1 * alpha):
        assert decay < abs(1.0 - other * complex(1.0, imaginary))


def test_it_does_not_stand_still_where_nothing_decays():
    """Near the imaginary axis the step is at least a hundredth of 1 / |λ|."""
    u = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert inverse_step_size(u, rotation(1e-6, 2.0).T @ u) == pytest.approx(200.0)
    assert inverse_step_size(u, -3.0 * u) == pytest.approx(3.0)


def test_power_iteration_finds_the_largest_eigenvalue():
    operator = Operator(diagonal(1.0, 2.0, 50.0))
    found = largest_inverse_step_size(operator, System(3))
    assert found == pytest.approx(50.0, rel=1e-6)
    assert operator.products == 10
    assert largest_inverse_step_size(Operator(diagonal(0.0, 0.0)), System(2)) == 0.0


def test_a_given_step_size_is_taken_as_it_is():
    operator, system = Operator(diagonal(1.0, 2.0)), System(2)
    assert persistent_step_size(0.3, operator, system, observed=1e9) == 0.3
    assert operator.products == 0 and system.memory == {}


def test_an_estimate_is_kept_raised_by_what_is_met_and_made_anew():
    operator, system = Operator(diagonal(1.0, 4.0)), System(2)
    first = persistent_step_size("auto", operator, system, observed=0.0)
    assert first == pytest.approx(0.25, rel=1e-3)
    made = operator.products
    assert persistent_step_size("auto", operator, system, observed=0.0) == first
    assert persistent_step_size("auto", operator, system, observed=8.0) == pytest.approx(1 / 8)
    assert operator.products == made
    for _ in range(3, REFRESH):
        persistent_step_size("auto", operator, system, observed=0.0)
    assert operator.products == made
    assert persistent_step_size("auto", operator, system, observed=0.0) == first
    assert operator.products == 2 * made


def test_a_gradient_that_is_lost_leaves_no_estimate():
    system = System(2)
    lost = Operator(diagonal(math.nan, 1.0))
    assert persistent_step_size("auto", lost, system, observed=0.0) == 0.0
    assert system.memory == {}
