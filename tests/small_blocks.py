"""A bilevel problem of data in blocks: losses, derivatives by autograd, and the same in mlo."""

from __future__ import annotations

import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR

import mlo
from mlo.testing import Vector

LOWER, UPPER, ROWS = 6, 5, 4
"""Blocks of the lower and upper data set, and rows per block."""


class Blocks:
    """G and F, their derivatives by autograd, and a fixed sequence of blocks of each."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(5)
        normal = self._normal
        self.a, self.b, self.c = normal(LOWER * ROWS, 4), normal(LOWER * ROWS), normal(3, 4)
        self.d, self.e, self.f = normal(UPPER * ROWS, 4), normal(UPPER * ROWS), normal(3, 4)
        self.z0, self.x0 = normal(4), normal(3)

    def _normal(self, *shape):
        return 0.7 * torch.randn(*shape, generator=self.generator, dtype=torch.float64)

    def drawn(self, blocks, count):
        return torch.randint(blocks, (count,), generator=self.generator).tolist()

    def lower(self, rows, z, x):
        a, b = rows
        scores = a @ z
        decay = ((x @ self.c) ** 2 + 0.5) @ (z * z) / 2
        return (torch.cosh(0.5 * (scores - b)) + scores * (a[:, :3] @ x) * 0.3).mean() + decay

    def upper(self, rows, z, x):
        d, e = rows
        return ((d @ z - e) ** 2).mean() / 2 + (torch.cos(d[:, :3] @ x)).mean() + z @ (x @ self.f)

    def G(self, i):
        return mlo.IndexedBatch(i, self._rows(i, self.a, self.b))

    def F(self, j):
        return mlo.IndexedBatch(j, self._rows(j, self.d, self.e))

    @staticmethod
    def _rows(i, *tensors):
        return tensors if i is None else tuple(t[i * ROWS : (i + 1) * ROWS] for t in tensors)

    # Derivatives. i or j None: of all blocks.

    def dG(self, i, z, x):
        z = z.clone().requires_grad_()
        return torch.autograd.grad(self.lower(self.G(i).tensors, z, x), z)[0]

    def products(self, i, z, x, q):
        """∇²₁₁G q and ∇²₂₁G q."""
        z, x = z.clone().requires_grad_(), x.clone().requires_grad_()
        (g,) = torch.autograd.grad(self.lower(self.G(i).tensors, z, x), z, create_graph=True)
        return torch.autograd.grad(g @ q, (z, x))

    def dF(self, j, z, x):
        z, x = z.clone().requires_grad_(), x.clone().requires_grad_()
        return torch.autograd.grad(self.upper(self.F(j).tensors, z, x), (z, x))

    # The same in mlo.

    def optimizer(self, engine, lower, upper, *, order="simultaneous", alpha, gamma, **settings):
        """An optimizer on given sequences of blocks; α and γ may be functions of the update."""
        z, x = Vector(self.z0.clone()), Vector(self.x0.clone())
        problems = []
        for name, module, rate, blocks, batch, loss in (
            ("z", z, alpha, lower, self.G, self._lower_loss),
            ("x", x, gamma, upper, self.F, self._upper_loss),
        ):
            sgd = SGD(module.parameters(), lr=1.0 if callable(rate) else rate)
            problems.append(
                mlo.Problem(
                    name,
                    module=module,
                    optimizer=sgd,
                    scheduler=LambdaLR(sgd, rate) if callable(rate) else None,
                    data=[batch(k) for k in blocks],
                    loss=loss,
                    **settings.get(name, {}),
                )
            )
        return mlo.MultilevelOptimizer(problems, {"z": engine}, order=order)

    def _lower_loss(self, module, batch, *, x):
        return self.lower(batch.tensors, module.v, x.v)

    def _upper_loss(self, module, batch, *, z):
        return self.upper(batch.tensors, z.v, module.v)
