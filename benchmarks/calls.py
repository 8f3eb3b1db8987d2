"""Counts the calls of mlo's functions that one request for a gradient takes, and their files.

The program is the README's example under `one_step`, after rounds. `sys.setprofile` counts calls of
Python functions that are defined in `mlo` (including comprehensions, if the interpreter makes
functions of them). PyTorch's calls are not counted.

    python benchmarks/calls.py             # the totals
    python benchmarks/calls.py --functions # and every function with its calls
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from measuring import SETTLED

import mlo

PACKAGE = Path(mlo.__file__).parent


@dataclass
class Calls:
    """Calls by (file, function), and the deepest chain of calls of mlo's own functions."""

    functions: Counter[tuple[str, str]] = field(default_factory=Counter)
    depth: int = 0

    @property
    def files(self) -> Counter[str]:
        """Calls by file."""
        found: Counter[str] = Counter()
        for (file, _), calls in self.functions.items():
            found[file] += calls
        return found

    def __str__(self) -> str:
        return (
            f"{sum(self.functions.values())} calls of {len(self.functions)} functions in "
            f"{len(self.files)} files, depth {self.depth}"
        )


def count(action: Callable[[], object]) -> Calls:
    """Runs an action and counts the calls of mlo's functions in it."""
    found, depth = Calls(), 0

    def profile(frame: FrameType, event: str, _: Any) -> None:
        nonlocal depth
        file = Path(frame.f_code.co_filename)
        if not file.is_relative_to(PACKAGE):
            return
        if event == "call":
            depth += 1
            found.depth = max(found.depth, depth)
            name = getattr(frame.f_code, "co_qualname", frame.f_code.co_name)
            found.functions[str(file.relative_to(PACKAGE)), name] += 1
        elif event == "return":
            depth -= 1

    sys.setprofile(profile)
    try:
        action()
    finally:
        sys.setprofile(None)
    return found


def readme_example() -> mlo.MultilevelOptimizer:
    """The decay of a linear model, learned from its validation loss."""
    torch.manual_seed(0)
    x = torch.randn(64, 20)
    y = x[:, :3].sum(1, keepdim=True) + torch.randn(64, 1)
    net, decay = torch.nn.Linear(20, 1), torch.nn.ParameterDict({"log": torch.tensor(-4.0)})

    def train_loss(net: Any, batch: None, *, decay: Any) -> torch.Tensor:
        fit: torch.Tensor = ((net(x[:32]) - y[:32]) ** 2).mean()
        return fit + decay["log"].exp() * (net.weight**2).sum()

    def valid_loss(decay: Any, batch: None, *, net: Any) -> torch.Tensor:
        fit: torch.Tensor = ((net(x[32:]) - y[32:]) ** 2).mean()
        return fit

    problems = [
        mlo.Problem(
            name,
            module=module,
            optimizer=torch.optim.Adam(module.parameters(), lr=0.05),
            loss=loss,
            steps=steps,
        )
        for name, module, loss, steps in (
            ("net", net, train_loss, 5),
            ("decay", decay, valid_loss, 1),
        )
    ]
    return mlo.MultilevelOptimizer(problems, hypergradient="one_step")


def main() -> None:
    """Prints the counts before the first round, when losses are checked too, and later."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--functions", action="store_true", help="every function with its calls")
    options = parser.parse_args()
    optimizer = readme_example()
    first = count(lambda: optimizer.gradient("decay"))
    for _ in range(SETTLED):
        optimizer.step()
    usual = count(lambda: optimizer.gradient("decay"))
    print(f"the first question, with the checks of losses: {first}")
    print(f"after {SETTLED} rounds: {usual}")
    if options.functions:
        for (file, name), calls in sorted(usual.functions.items()):
            print(f"  {calls:>3}  {file}: {name}")


if __name__ == "__main__":
    main()
