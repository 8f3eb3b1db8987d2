"""Counts how the operators of a step grow with the length of a chain of problems.

    python benchmarks/chain.py [--longest 9] [--csv FILE]

Each problem is a vector of four numbers with a quadratic loss. In a chain that reads one way each
reads the one below it; in one that reads both ways, the one above it as well. The count is of
PyTorch's dispatched operators in a step in which no loss is checked, without views. It does not
depend on the machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from measuring import SETTLED, write_measurements
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mlo import MultilevelOptimizer, Problem

WIDTH = 4
LENGTHS = range(2, 10)


class Operators(TorchDispatchMode):
    """Counts the operators that are dispatched while it is active; views compute nothing."""

    count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def problem(index: int, reads: list[str]) -> Problem:
    """The problem at a place of the chain, which reads others by name."""
    module = nn.ParameterDict({"value": torch.full((WIDTH,), 0.1 * (index + 1))})

    def loss(own: Any, batch: None, **others: Any) -> Tensor:
        pulled = sum((other["value"] for other in others.values()), torch.zeros(WIDTH))
        return ((own["value"] - 0.5 * pulled) ** 2 + own["value"].cos()).sum()

    return Problem(
        f"p{index}",
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        loss=loss,
        reads=reads,
    )


def chain(length: int, both_ways: bool, engine: str) -> MultilevelOptimizer:
    """A chain of problems, the innermost one first."""
    problems = []
    for index in range(length):
        reads = [f"p{index - 1}"] if index else []
        if both_ways and index + 1 < length:
            reads.append(f"p{index + 1}")
        problems.append(problem(index, reads))
    return MultilevelOptimizer(problems, engine)


def operators(length: int, both_ways: bool, engine: str) -> int:
    """The operators of a step in which no loss is checked."""
    optimizer = chain(length, both_ways, engine)
    for _ in range(SETTLED):
        optimizer.step()
    with Operators() as counted:
        optimizer.step()
    return counted.count


def main() -> None:
    """Prints a row for each engine and kind of chain."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--longest", type=int, default=LENGTHS[-1], help="problems")
    parser.add_argument("--csv", type=Path, help="also writes the counts into this file")
    args = parser.parse_args()
    lengths = [length for length in LENGTHS if length <= args.longest]
    print(f"| engine | reads | {' | '.join(map(str, lengths))} |\n|{'---|' * (len(lengths) + 2)}")
    measured: list[Mapping[str, object]] = []
    for engine in ("one_step", "identity"):
        for reads in ("one way", "both ways"):
            counts = [operators(length, reads == "both ways", engine) for length in lengths]
            print(f"| {engine} | {reads} | {' | '.join(map(str, counts))} |", flush=True)
            measured += [
                {"engine": engine, "reads": reads, "problems": length, "operators": count}
                for length, count in zip(lengths, counts, strict=True)
            ]
    if args.csv:
        write_measurements(args.csv, measured, part=("engine", "reads", "problems"))


if __name__ == "__main__":
    main()
