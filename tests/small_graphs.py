"""Small problems with a default loss, and graphs of them."""

from __future__ import annotations

import torch

import mlo
from mlo.testing import Vector


def problem(name, loss=None, module=None, **options):
    module = module or Vector(torch.ones(2))
    options.setdefault("optimizer", torch.optim.SGD(module.parameters(), lr=0.1))
    return mlo.Problem(
        name, module=module, loss=loss or (lambda own, batch: own.v.sum()), **options
    )


def graph(*problems):
    return mlo.DependencyGraph(list(problems))
