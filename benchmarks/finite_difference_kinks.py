"""How far `darts` (finite differences) is from `one_step` (exact) for α.

On smooth and on ReLU supernets.

Prints a Markdown table: relative error and cosine of the implicit part of the architecture's
gradient (the gradient minus the direct one), for digits at 8×8, C=4, 3 cells, 2 nodes, after 0 and
5 rounds of the search.

    python benchmarks/finite_difference_kinks.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lfmcw_app.build_modules import build_modules
from lfmcw_app.data import load_dataset, search_split
from lfmcw_app.problems import build_search
from lfmcw_app.recipe_loading import load_recipe
from lfmcw_app.search_space.operations import DARTS_PRIMITIVES
from mlo import MultilevelOptimizer
from mlo.hypergradient import Cotangent, EngineChoice, LinearSystem, OneStep, Solve

SMOOTH = tuple(primitive for primitive in DARTS_PRIMITIVES if primitive != "max_pool_3x3")
STEPS = ("adaptive", "darts", 1e-4, 1.0)


def make(activation: str, primitives: tuple[str, ...], dtype: torch.dtype) -> MultilevelOptimizer:
    """A search on digits, always from the same initial values."""
    recipe = load_recipe("smoke", overrides={"search.primitives": list(primitives)})
    torch.manual_seed(0)
    dataset = load_dataset("digits")
    train, validation = search_split(dataset, None, 0)
    modules = build_modules(recipe.search, dataset, activation=activation, dtype=dtype)
    return build_search(recipe, dataset, train, validation, modules, dtype=dtype)


@dataclass(frozen=True, kw_only=True)
class LookAheadOnly(OneStep):
    """Moves the lower problems one step, as `one_step` does, without the step's derivative."""

    name: ClassVar[str] = "look_ahead_only"

    def solve(self, system: LinearSystem, cotangent: Cotangent) -> Solve:
        """Returns zero."""
        return Solve(q=[None] * len(cotangent), report=self.report(system.problem))


def implicit_part(optimizer: MultilevelOptimizer, engine: EngineChoice) -> Tensor:
    """The architecture's gradient minus the direct one, at the same look-ahead W2', flat."""

    def gradient(choice: EngineChoice) -> Tensor:
        twin = MultilevelOptimizer(list(optimizer.problems.values()), choice)
        return torch.cat([g.flatten() for g in twin.gradient("arch").values()]).double()

    return gradient(engine) - gradient(LookAheadOnly())


def main() -> None:
    """Prints the table."""
    print("| network | dtype | rounds | step rule | relative error | cosine |")
    print("|---|---|---|---|---|---|")
    for activation, primitives in (("silu", SMOOTH), ("relu", DARTS_PRIMITIVES)):
        name = "SiLU, average pooling" if activation == "silu" else "ReLU, all primitives"
        for dtype in (torch.float32, torch.float64):
            optimizer = make(activation, primitives, dtype)
            for rounds in (0, 5):
                list(optimizer.run(rounds))
                exact = implicit_part(optimizer, "one_step")
                for step in STEPS:
                    found = implicit_part(optimizer, {"name": "darts", "step": step})
                    error = float((found - exact).norm() / exact.norm())
                    cosine = float(found @ exact / (found.norm() * exact.norm()))
                    label = step if isinstance(step, str) else f"{step:g} / ‖v‖"
                    kind = str(dtype).removeprefix("torch.")
                    print(
                        f"| {name} | {kind} | {rounds} | {label} | {error:.1e} | {cosine:.3f} |",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
