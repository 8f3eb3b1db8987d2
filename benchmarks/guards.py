"""Measures the cost of a run's checks: the first round, which makes them, against later ones.

The problem is a perceptron of 1 M parameters under SGD with momentum, and above it weights of
classes under Adam. Each engine's first round is timed on the processor and compared with the median
of later ones. The difference includes everything that is done once. It is given as a share of 100
rounds.

    python benchmarks/guards.py          # about a minute on one thread
    python benchmarks/guards.py --quick  # a small network, one run: only shows that it works
"""

from __future__ import annotations

import argparse
import statistics
import time
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mlo

Batch = tuple[Tensor, Tensor]
ENGINES: dict[str, str | dict[str, Any]] = {
    "one_step": "one_step",
    "darts": "darts",
    "identity": "identity",
    "cg": {"name": "cg", "max_steps": 5, "tol": 1.0, "damping": 1.0},
}


def declare(engine: str | dict[str, Any], hidden: int) -> mlo.MultilevelOptimizer:
    """The two problems with an engine below the weights of classes."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(784, hidden),
        nn.Tanh(),
        nn.Linear(hidden, hidden // 2),
        nn.Tanh(),
        nn.Linear(hidden // 2, 10),
    )
    weights = nn.ParameterDict({"log": torch.zeros(10)})
    data = [(torch.randn(128, 784), torch.randint(10, (128,))) for _ in range(4)]

    def train_loss(net: nn.Module, batch: Batch, *, weights: Any) -> Tensor:
        losses = F.cross_entropy(net(batch[0]), batch[1], reduction="none")
        weighted: Tensor = weights["log"].exp()[batch[1]] * losses
        return weighted.mean()

    def valid_loss(weights: Any, batch: Batch, *, net: nn.Module) -> Tensor:
        return F.cross_entropy(net(batch[0]), batch[1])

    sgd = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    adam = torch.optim.Adam(weights.parameters(), lr=0.01)
    lower = mlo.Problem("net", module=net, optimizer=sgd, loss=train_loss, data=data)
    upper = mlo.Problem("weights", module=weights, optimizer=adam, loss=valid_loss, data=data)
    return mlo.MultilevelOptimizer([lower, upper], engine)


def rounds(optimizer: mlo.MultilevelOptimizer, count: int) -> list[float]:
    """Processor seconds of each round."""
    found = []
    for _ in range(count):
        start = time.process_time()
        optimizer.step()
        found.append(time.process_time() - start)
    return found


def main() -> None:
    """Prints a row per engine."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", mlo.SolveWarning)
    hidden, repeats = (16, 1) if options.quick else (800, options.repeats)
    print("| engine | first round, ms | later, ms | the first adds to 100 rounds, % |")
    print("|---|---|---|---|")
    for name, engine in ENGINES.items():
        times = [rounds(declare(engine, hidden), 25) for _ in range(repeats)]
        first = statistics.median(one[0] for one in times)
        later = statistics.median(statistics.median(one[5:]) for one in times)
        share = 100 * (first - later) / (100 * later)
        print(f"| {name} | {first * 1e3:.1f} | {later * 1e3:.1f} | {share:.2f} |")


if __name__ == "__main__":
    main()
