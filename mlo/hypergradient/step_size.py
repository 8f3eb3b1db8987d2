"""Step sizes of iterations on A: the largest at which every component of the error decays."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mlo.hypergradient.iterative import FlatOperator, fixed_noise
from mlo.hypergradient.products import LinearSystem

__all__ = ["inverse_step_size", "largest_inverse_step_size", "persistent_step_size"]

REFRESH = 100
"""Number of solves after which a kept step size is estimated again."""


def inverse_step_size(u: Tensor, product: Tensor) -> Tensor:
    """Returns the 1/α at which an error along u decays fastest, given u and Aᵀu.

    q ← q − α Aᵀq multiplies the component of an eigenvalue λ by 1 − αλ, which is least in modulus
    at α = Re λ / |λ|². For a symmetric positive definite A that is 1/λ. For the spirals of a game
    it is smaller than 1/|λ|, at which they would grow.

    Here it is α = ⟨u, Aᵀu⟩ / ‖Aᵀu‖², but at least a hundredth of 1/|λ|. At eigenvalues near the
    imaginary axis, or of both signs, no step makes everything decay, and a step of nearly zero
    would make no progress.
    """
    size, along = product.norm(), u @ product
    ratio = size / u.norm()  # |λ|, where u is an eigenvector
    found = torch.where(along > 0.0, torch.minimum(size * (size / along), 100.0 * ratio), ratio)
    return torch.where(size == 0.0, size, found)


def largest_inverse_step_size(
    operator: FlatOperator, system: LinearSystem, products: int = 10
) -> float:
    """Estimates λmax by power iteration; for a game, its counterpart `inverse_step_size`."""
    # Noise that is always the same: a solve that is repeated gives the same bits.
    u = fixed_noise(operator, system, 1)[:, 0]
    with torch.no_grad():
        for _ in range(products):
            size = u.norm()
            u = u / torch.where(size == 0.0, torch.ones_like(size), size)
            product = operator(u).detach()
            estimate = inverse_step_size(u, product)
            u = product
    return float(estimate)  # only here is a GPU waited for


def persistent_step_size(
    step_size: float | str, operator: FlatOperator, system: LinearSystem, *, observed: float
) -> float:
    """Returns α; for "auto" 1 / λmax (see `inverse_step_size`), kept from one solve to the next.

    Args:
        step_size: the option.
        operator: estimates λmax when there is no estimate yet, and again every `REFRESH` solves, so
            that a batch of unusual curvature is forgotten.
        system: keeps the estimate.
        observed: ‖Aᵀu‖ / ‖u‖ of a vector met since, a lower bound of λmax. A vector that diverges
            turns towards the largest eigenvalue, so the estimate grows before the vector blows up.
    """
    if not isinstance(step_size, str):
        return float(step_size)
    # The estimate and its age are the engine's memory, and so part of the run's state.
    known, age = system.recall("curvature"), system.recall("age")
    solves = 0 if age is None else int(age)
    if known is None or solves % REFRESH == 0:
        largest = largest_inverse_step_size(operator, system)
    else:
        largest = float(known)
    if math.isfinite(observed):
        largest = max(largest, observed)
    if not math.isfinite(largest):
        return 0.0  # the gradient itself is not finite; nothing of it is kept
    system.keep("curvature", torch.tensor(largest, dtype=torch.float64))
    system.keep("age", torch.tensor(solves + 1))
    return 1.0 / largest if largest > 0.0 else 1.0
