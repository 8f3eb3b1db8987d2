"""Small problems with a default loss, graphs of them, and an optimizer of three."""

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


def three_vectors(order, *, reg_loss=None, engine="one_step", steps=(1, 1, 1), **options):
    """net reads aug; aug reads net and reg; reg reads net alone, unless its loss is another."""
    losses = {
        "net": lambda net, batch, *, aug: (net.v - aug.v).square().sum(),
        "aug": lambda aug, batch, *, net, reg: (net.v.sum() - 1.0).square() + (aug.v * reg.v).sum(),
        "reg": reg_loss or (lambda reg, batch, *, net: (net.v - 2.0).square().sum()),
    }
    made = {}
    for name, count in zip(losses, steps, strict=True):
        made[name] = problem(name, losses[name], steps=count, **options.get(name, {}))
    return mlo.MultilevelOptimizer([made[name] for name in order], engine)
