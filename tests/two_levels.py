"""A problem on noisy batches below another one, with hooks around the steps of both."""

from __future__ import annotations

import torch

import mlo
from mlo.testing import Vector


def two_levels(engine="one_step", *, lower=None, upper=None, steps=2, direct=0.0, **options):
    """w follows x on noisy batches; x is judged by w."""
    torch.manual_seed(0)
    w, x = Vector(torch.zeros(2).double()), Vector(torch.ones(2).double())
    data = [torch.randn(2).double() for _ in range(5)]
    problems = [
        mlo.Problem(
            "w",
            module=w,
            optimizer=torch.optim.SGD(w.parameters(), lr=0.1, momentum=0.9),
            loss=lambda w, batch, *, x: ((w.v - x.v * batch) ** 2).sum() + (w.v**4).sum(),
            data=data,
            steps=steps,
            **(lower or {}),
        ),
        mlo.Problem(
            "x",
            module=x,
            optimizer=torch.optim.Adam(x.parameters(), lr=0.05),
            loss=lambda x, batch, *, w: (w.v**2).sum() + direct * x.v.sum() + torch.rand(()),
            **(upper or {}),
        ),
    ]
    return mlo.MultilevelOptimizer(problems, engine, **options)
