"""A custom hypergradient engine: Chebyshev iteration, registered and compared with `direct`.

An engine finds q with A^T q = v from products alone. v is the gradient of the upper loss in the
lower parameters, and A the Hessian of the lower loss. Chebyshev iteration needs bounds [a, b] on
the eigenvalues of A, and no inner products. After K steps its residual is p_K(A) v for the
polynomial with p_K(0) = 1 that is smallest on [a, b], so for symmetric A

    |A q_K - v| / |v|  <=  1 / T_K((b + a) / (b - a)),      T_K: Chebyshev polynomial.

The script also prints `neumann` with as many terms, and the error of the whole hypergradient
against the closed form. To test an engine for real use, inherit `mlo.testing.EngineContract`.

    python examples/custom_engine.py
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import matplotlib.pyplot as plt
import torch
from torch import Tensor

import mlo
from mlo.hypergradient import LinearSystem, Solve, relative_residual
from mlo.testing import bilevel_quadratic, relative_error


@dataclass(frozen=True, kw_only=True)
class Chebyshev(mlo.Engine):
    """K steps of Chebyshev iteration for a symmetric A with eigenvalues in [smallest, largest]."""

    num_steps: int = 10
    smallest: float = 0.1
    largest: float = 1.0

    name: ClassVar[str] = "chebyshev"
    inverts: ClassVar[bool] = True

    def solve(self, system: LinearSystem, cotangent: Sequence[Tensor | None]) -> Solve:
        """Saad, Iterative Methods for Sparse Linear Systems (2003), Algorithm 12.1."""
        v = [
            torch.zeros_like(t) if c is None else c
            for t, c in zip(system.parameters, cotangent, strict=True)
        ]

        center, radius = (self.largest + self.smallest) / 2, (self.largest - self.smallest) / 2
        rho = radius / center
        q, residual, move = [torch.zeros_like(t) for t in v], v, [t / center for t in v]
        for step in range(self.num_steps):
            q = [a + d for a, d in zip(q, move, strict=True)]
            if step + 1 == self.num_steps:
                break  # the next move would need one more product
            product = system.transpose_product(move)
            residual = [r - p for r, p in zip(residual, product, strict=True)]
            previous, rho = rho, 1 / (2 * center / radius - rho)
            move = [
                rho * previous * d + 2 * rho / radius * r
                for d, r in zip(move, residual, strict=True)
            ]

        # The bound is guaranteed, so a residual above it (with room for rounding) means that the
        # interval is wrong.
        left = relative_residual(system, [t.detach() for t in q], [t.detach() for t in v])
        advice = (
            "Raise num_steps, or set smallest and largest to bounds of the Hessian's eigenvalues."
        )
        report = self.report(
            system.problem,
            iterations=self.num_steps,
            residual=left,
            advice="" if left <= self.bound() + 1e-8 else advice,
        )
        return Solve(q=q, report=report)

    def bound(self) -> float:
        """Largest relative residual after K steps: 1 / T_K((b + a) / (b - a)).

        T_K(x) = cosh(K arcosh x).
        """
        x = (self.largest + self.smallest) / (self.largest - self.smallest)
        return 1 / math.cosh(self.num_steps * math.acosh(x))


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Compares a third-party engine with the built-in ones."
    )
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32], help="values of K"
    )
    parser.add_argument(
        "--condition",
        type=float,
        default=10.0,
        help="condition number of the lower problem, above 1",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the problem")
    parser.add_argument("--picture", default="custom_engine.png", help="file for the errors")
    args = parser.parse_args()
    torch.set_num_threads(1)

    mlo.register_engine("chebyshev", Chebyshev)  # a name like any other from here on
    # The eigenvalues are 1 / condition ... 1.
    problem = bilevel_quadratic(dim=40, condition=args.condition, seed=args.seed)

    def measured(engine: dict[str, object] | str) -> tuple[float, float]:
        """Relative error of the hypergradient, and the solve's relative residual."""
        twin = bilevel_quadratic(dim=40, condition=args.condition, seed=args.seed).optimizer(engine)
        error = relative_error(twin.gradient("x")["v"], problem.exact)
        return error, twin.step().solves["w"].residual or 0.0

    print(f"direct: error {measured('direct')[0]:.2e}")
    print("| K | chebyshev residual | its bound | chebyshev error | neumann error |")
    print("|---|---|---|---|---|")
    rows = []
    for steps in args.steps:
        options = {"num_steps": steps, "smallest": 1 / args.condition, "largest": 1.0}
        error, residual = measured({"name": "chebyshev", **options})
        neumann, _ = measured({"name": "neumann", "num_terms": steps, "step_size": 1.0, "tol": 1.0})
        bound = Chebyshev(**options).bound()
        print(f"| {steps} | {residual:.2e} | {bound:.2e} | {error:.2e} | {neumann:.2e} |")
        rows.append((residual, bound, error, neumann))

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    labels = ("chebyshev residual", "its bound", "chebyshev error", "neumann error")
    axes.loglog(args.steps, rows, "o-", label=labels)
    axes.set(title="engines of K steps", xlabel="K", ylabel="relative size")
    axes.legend()
    figure.savefig(args.picture, dpi=100)


if __name__ == "__main__":
    main()
