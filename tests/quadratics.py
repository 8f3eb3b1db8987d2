"""Quadratic lower problems with a given Jacobian, and the Krylov spaces of their solves."""

from __future__ import annotations

import torch

import mlo
from mlo.testing import Vector

DIM = 8


def quadratic(matrix, engine, *, seed=2, dtype=torch.float64, lr=0.0, **options):
    """An optimizer of two problems, B and v.

    The lower loss is ½ wᵀMw − wᵀBx, whose stationarity map F = M w − B x has the Jacobian M. The
    upper loss is wᵀv, so v is the cotangent of the solution. No learning rate moves anything but
    `lr`, of w.
    """
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(DIM, 3, generator=generator, dtype=torch.float64).to(dtype)
    v = torch.randn(DIM, generator=generator, dtype=torch.float64).to(dtype)
    m = matrix.to(dtype)
    w, x = Vector(torch.zeros(DIM, dtype=dtype)), Vector(torch.zeros(3, dtype=dtype))
    lower = mlo.Problem(
        "w",
        module=w,
        optimizer=torch.optim.SGD(w.parameters(), lr=lr),
        loss=lambda w, _, *, x: 0.5 * w.v @ m @ w.v - w.v @ (b @ x.v),
        **options,
    )
    upper = mlo.Problem(
        "x",
        module=x,
        optimizer=torch.optim.SGD(x.parameters(), lr=0.0),
        loss=lambda x, _, *, w: w.v @ v,
    )
    return mlo.MultilevelOptimizer([lower, upper], engine), b, v


def symmetric(eigenvalues):
    """A symmetric matrix with these eigenvalues."""
    generator = torch.Generator().manual_seed(5)
    basis, _ = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator, dtype=torch.float64))
    return (basis * torch.tensor(eigenvalues, dtype=torch.float64)) @ basis.T


POSITIVE = symmetric([0.1, 0.2, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0])
INDEFINITE = symmetric([-1.0, -0.3, 0.4, 0.5, 0.7, 1.0, 1.5, 2.0])


def krylov(matrix, v, steps):
    """An orthonormal basis of span{v, Mv, …}."""
    columns = [v]
    for _ in range(steps - 1):
        columns.append(matrix @ columns[-1])
    basis, _ = torch.linalg.qr(torch.stack(columns, 1))
    return basis
