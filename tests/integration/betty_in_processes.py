"""A program for Betty with `strategy="distributed"`, as each of several processes runs it."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from small_betty_programs import library
from torch import nn
from torch.optim import SGD

ROWS = 4


def batches(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return [
        (
            torch.randn(ROWS, 3, dtype=torch.float64, generator=generator),
            torch.randn(ROWS, 1, dtype=torch.float64, generator=generator),
        )
        for _ in range(count)
    ]


def merged(loader, size):
    """The batches that so many processes share in each step, as one batch each."""
    return [
        tuple(torch.cat(parts) for parts in zip(*loader[k : k + size], strict=True))
        for k in range(0, len(loader), size)
    ]


def program(size=1, **options):
    """Runs the program; returns its parameters and how many steps it made.

    Args:
        size: of processes; 1: one process with batches that are so many times larger.
        options: of the engine's configuration.
    """
    found = library()
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    scale = nn.Linear(1, 1).double()

    class Low(found.ImplicitProblem):
        def training_step(self, batch):
            x, y = batch
            losses = (self.module(x) - y) ** 2
            return (self.up(losses.detach()).sigmoid() * losses).mean()

        def param_callback(self):
            # Programs reach through DistributedDataParallel by `.module`.
            inner = self.module.module if options.get("strategy") == "distributed" else self.module
            assert isinstance(inner, nn.Sequential)

    class Up(found.ImplicitProblem):
        def training_step(self, batch):
            x, y = batch
            return ((self.low(x) - y) ** 2).mean()

    class Stopping(found.Engine):
        def validation(self):
            return {"loss": abs(self.global_step - 4)}

    shared = size if options.get("strategy") != "distributed" else 1
    low = Low(
        name="low",
        config=found.Config(
            type="neumann", neumann_iterations=3, neumann_alpha=0.1, unroll_steps=2
        ),
        module=net,
        optimizer=SGD(net.parameters(), lr=0.1, momentum=0.5),
        train_data_loader=merged(batches(12, seed=1), shared),
    )
    up = Up(
        name="up",
        config=found.Config(gradient_accumulation=2),
        module=scale,
        optimizer=SGD(scale.parameters(), lr=1.0),
        train_data_loader=merged(batches(8, seed=2), shared),
    )
    engine = Stopping(
        problems=[up, low],
        config=found.EngineConfig(
            train_iters=20, valid_step=2, early_stopping=True, early_stopping_tolerance=2, **options
        ),
        dependencies={"l2u": {low: [up]}, "u2l": {up: [low]}},
    )
    engine.run()
    parameters = [p.detach().flatten() for module in (net, scale) for p in module.parameters()]
    return torch.cat(parameters), engine.global_step


if __name__ == "__main__":
    store, rank, size, folder = sys.argv[1:]
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(size)
    )
    torch.save(
        program(int(size), strategy="distributed", backend="gloo"), f"{folder}/betty{rank}.pt"
    )
    assert not dist.is_initialized()  # Betty's cleanup leaves the group
