"""Small programs for Betty, on Betty or on `mlo.compat.betty`; smooth, in float64."""

from __future__ import annotations

import importlib
import logging
from types import SimpleNamespace

import torch
from torch import nn
from torch.optim import SGD

OURS, THEIRS = "mlo.compat.betty", "betty"


def library(name=OURS):
    """The classes that a program imports, from either library, whose loggers are silent."""
    found = SimpleNamespace()
    for module, names in {
        "engine": ("Engine",),
        "problems": ("ImplicitProblem", "IterativeProblem", "HigherIterativeProblem"),
        "configs": ("Config", "EngineConfig"),
        "envs": ("Env",),
    }.items():
        for each in names:
            setattr(found, each, getattr(importlib.import_module(f"{name}.{module}"), each))
    logging.getLogger("mlo.compat.betty").setLevel(logging.ERROR)
    if name == THEIRS:
        importlib.import_module("betty.logging").logger().info("")
        logging.getLogger("betty").setLevel(logging.ERROR)
    return found


class Value(nn.Module):
    """One vector, which calling returns."""

    def __init__(self, *entries):
        super().__init__()
        self.v = nn.Parameter(torch.tensor(entries, dtype=torch.float64))

    def forward(self):
        return self.v


def batches(count=5):
    """Batches of one number each, so that another batch gives another gradient."""
    return [(torch.tensor([0.1 * k], dtype=torch.float64),) for k in range(count)]


def lower_loss(w, x, b):
    """Smooth, with a Hessian that depends on w; w and x are vectors of 2."""
    scale = torch.tensor([1.0, 3.0], dtype=torch.float64)
    coupled = 0.2 * w[0] * w[1] * x[0] + 0.1 * w[1] ** 3 * x[1]
    return (0.5 * scale * w**2 + 0.1 * w**4 - (x + b) * w).sum() + coupled


def upper_loss(w, x, b):
    return ((w - 0.5 + b) ** 2).sum() + 0.05 * (x**2).sum()


def bilevel(
    found=None,
    *,
    lower=None,
    upper=None,
    engine=None,
    kind="ImplicitProblem",
    optimizer=SGD,
    rate=0.2,
    methods=None,
    upper_methods=None,
    engine_class=None,
    run=True,
    **options,
):
    """A lower problem `low` and an upper one `up`; runs it, and returns its engine.

    Args:
        found: the library.
        lower, upper, engine: fields of the configurations.
        kind: class of the lower problem.
        methods, upper_methods: of the problems, beside `training_step`.
        engine_class: Engine → the class that is used.
        options: of the lower optimizer.
    """
    found = found or library()
    methods, upper_methods = methods or {}, upper_methods or {}

    def low_step(self, batch):
        return lower_loss(self.module(), self.up(), batch[0])

    def up_step(self, batch):
        return {"loss": upper_loss(self.low(), self.module(), batch[0]), "size": self.low().norm()}

    low_class = type("Low", (getattr(found, kind),), {"training_step": low_step, **methods})
    up_class = type("Up", (found.ImplicitProblem,), {"training_step": up_step, **upper_methods})
    w, x = Value(0.3, -0.2), Value(0.4, 0.1)
    low = low_class(
        name="low",
        module=w,
        optimizer=optimizer(w.parameters(), lr=rate, **options),
        train_data_loader=batches(),
        config=found.Config(**(lower or {})),
    )
    up = up_class(
        name="up",
        module=x,
        optimizer=SGD(x.parameters(), lr=0.3),
        train_data_loader=batches(3),
        config=found.Config(retain_graph=True, **(upper or {})),
    )
    made = (engine_class or (lambda base: base))(found.Engine)(
        problems=[up, low],
        config=found.EngineConfig(**{"train_iters": 12, "strategy": "cpu", **(engine or {})}),
        dependencies={"l2u": {low: [up]}, "u2l": {up: [low]}},
    )
    if run:
        made.run()
    return made


def values(engine):
    """All parameters of a program, as one vector."""
    parameters = [p for problem in engine.problems for p in problem.module.parameters()]
    return torch.cat([p.detach().flatten() for p in parameters])


def problems(*names, **configs):
    """Problems by themselves, of one parameter each; configs: name → options."""
    found = library()
    made = []
    for name in names:
        module = Value(1.0)
        kind = type(
            "Plain",
            (found.ImplicitProblem,),
            {"training_step": lambda self, batch: (self.module() ** 2).sum()},
        )
        made.append(
            kind(
                name,
                found.Config(**configs.get(name, {})),
                module,
                SGD(module.parameters(), lr=0.1),
                train_data_loader=batches(),
            )
        )
    return made
