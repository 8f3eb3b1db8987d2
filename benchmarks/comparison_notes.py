"""Measures figures in the notes of docs/comparison.md, with the other libraries that are installed.

    python benchmarks/comparison_notes.py

Each line names the note and the version of the library. A library that is not installed is named.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec

import torch
from measuring import installed
from torch import Tensor

import mlo
from mlo.testing import bilevel_quadratic, relative_error


def betty() -> Iterator[str]:
    """Note 11: Betty's `cg` does not converge."""
    errors = []
    for iterations in (1, 2, 3, 5, 10, 20):
        problem = bilevel_quadratic()
        engine = {"name": "betty-cg", "iterations": iterations}
        found = problem.optimizer(engine).gradient("x")["v"]
        errors.append(f"{relative_error(found, problem.exact):.2f}")
    yield f"note 11: cg after 1, 2, 3, 5, 10, 20 iterations: errors {', '.join(errors)}"


def torchopt() -> Iterator[str]:
    """Notes 2, 13 and 15: TorchOpt's linear solvers and its estimator."""
    import torchopt as library

    def root(solve: Callable[..., Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        """θ with θ³ + θ = x, by Newton's method, which the library differentiates."""

        @library.diff.implicit.custom_root(
            lambda theta, x: theta**3 + theta - x, argnums=1, solve=solve
        )
        def solved(theta: Tensor, x: Tensor) -> Tensor:
            for _ in range(50):
                theta = theta - (theta**3 + theta - x) / (3 * theta**2 + 1)
            return theta.detach()

        return solved

    start, at = torch.full((1,), 0.5, dtype=torch.float64), 2.0
    theta = torch.tensor(1.0, dtype=torch.float64)  # 1³ + 1 = 2
    second = float(-6 * theta / (3 * theta**2 + 1) ** 3)
    solves = library.linear_solve
    for name, solve in {
        "solve_cg": solves.solve_cg(),
        "solve_normal_cg": solves.solve_normal_cg(),
        "solve_inv(ns=False)": solves.solve_inv(ns=False),
    }.items():
        x = torch.full((1,), at, dtype=torch.float64, requires_grad=True)
        (first,) = torch.autograd.grad(root(solve)(start, x).sum(), x, create_graph=True)
        found = 0.0
        if first.requires_grad:
            (again,) = torch.autograd.grad(first.sum(), x, allow_unused=True)
            found = 0.0 if again is None else float(again)
        yield f"note 2: {name}: second derivative {found:.4f}; the right one is {second:.4f}"
    for name, solve in {"solve_cg": solves.solve_cg(), "solve_inv": solves.solve_inv()}.items():
        x = torch.tensor(at, dtype=torch.float64, requires_grad=True)
        try:
            (first,) = torch.autograd.grad(root(solve)(start[0], x), x)
            said = f"gradient {float(first):.4f}"
        except (RuntimeError, ValueError, IndexError) as error:
            said = f"{type(error).__name__}"
        yield f"note 13: {name}, without dimensions: {said}; the right one is 0.2500"
    for method in ("forward", "naive", "antithetic"):
        torch.manual_seed(0)
        value = torch.randn(20, dtype=torch.float64, requires_grad=True)
        matrix = torch.randn(20, 20, dtype=torch.float64)
        normal = torch.distributions.Normal(torch.zeros(20).double(), torch.ones(20).double())
        loss = library.diff.zero_order(
            normal.sample, argnums=0, method=method, num_samples=1000, sigma=0.01
        )(lambda v, m=matrix: ((m @ v) ** 2).sum() / 2)
        (found,) = torch.autograd.grad(loss(value), value)
        right = matrix.T @ matrix @ value.detach()
        cosine = float(found @ right / (found.norm() * right.norm()))
        yield f'note 15: zero_order(method="{method}"), 1,000 samples: cosine {cosine:.2f}'


LIBRARIES: dict[str, tuple[str, Callable[[], Iterator[str]]]] = {
    "betty-ml": ("betty", betty),
    "torchopt": ("torchopt", torchopt),
}
"""Package → the module that it installs, and what measures its notes."""


def main() -> None:
    """Prints a line per figure."""
    print(f"{time.strftime('%Y-%m-%d')}, {installed('torch')}, mlo {mlo.__version__}")
    for package, (module, notes) in LIBRARIES.items():
        print(installed(package))
        if find_spec(module) is not None:
            for note in notes():
                print(f"  {note}")


if __name__ == "__main__":
    main()
