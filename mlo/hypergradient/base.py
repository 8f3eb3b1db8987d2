"""What a hypergradient engine is: an inverse times products, evaluated where the solution's
derivative is taken.

For a stationarity map F(θ, x) = ∇_θ L (for a game: the players' gradients, stacked) with A = ∂F/∂θ
and B = ∂F/∂x, the response's cotangent is -Bᵀ q with q = A⁻ᵀ v. A subclass of `Engine` says how q
is found (the inverse); its `products` say how A, Aᵀ and Bᵀ are applied. The two choices are
independent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from mlo.errors import EngineError
from mlo.hypergradient.products import Autograd, LinearSystem, Products, products_from
from mlo.records import SolveReport
from mlo.sharding import total_norm

if TYPE_CHECKING:
    from mlo.problem import Tensors
    from mlo.response import Context, Pullback, Solution

__all__ = ["Engine", "Solve", "relative_residual"]

Cotangent = Sequence[Tensor | None]
"""One tensor per parameter; None where nothing above reads that parameter."""


@dataclass(frozen=True, kw_only=True)
class Solve:
    """The result of an inverse product: q ≈ A⁻ᵀ v, one entry per parameter (None: zero), and how it
    went.
    """

    q: Cotangent
    report: SolveReport


@dataclass(frozen=True, kw_only=True)
class Engine(ABC):
    """Base of all hypergradient engines; immutable, so one object can serve many problems.

    Attributes:
        products: how products with derivatives of F are taken: an `Autograd()` or
            `FiniteDifference(...)`, or the name of one, or a mapping `{"name": ..., option: ...}`.
        differentiates_step: whether the derivative is that of the optimizer's last step, taken
            where it was made.
        applies_linear_steps: whether it applies recorded steps again also where they are linear in
            their gradient (SGD's), for which the optimizer's state is copied at every update; else
            `OptimizerStep.gain` says all of such a step.
        drops_implicit_term: whether the solution is treated as a constant.
        inverts: whether products with A itself are iterated, which amplifies their errors.
        needs_symmetry: whether A must be symmetric, which a game's Jacobian is not.
    """

    products: Products = field(default_factory=Autograd)

    name: ClassVar[str]
    differentiates_step: ClassVar[bool] = False
    applies_linear_steps: ClassVar[bool] = True
    drops_implicit_term: ClassVar[bool] = False
    inverts: ClassVar[bool] = False
    needs_symmetry: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "products", products_from(self.products))

    @property
    def differentiable(self) -> bool:
        """Whether the engine's pullback can itself be differentiated."""
        return self.drops_implicit_term or self.products.differentiable

    @property
    def label(self) -> str:
        """The engine's name, with its products where they are not exact."""
        return (
            self.name
            if isinstance(self.products, Autograd)
            else f"{self.name} × {self.products.name}"
        )

    @property
    def keeps_graph(self) -> bool:
        """Whether the gradient that a step is made with is kept with its graph, to be
        differentiated later in the round.
        """
        return False

    @property
    def recorded_steps(self) -> int:
        """How many of the optimizer's last steps are kept for the derivative."""
        return 1

    def respond(self, solution: Solution, context: Context) -> Tensors | None:
        """Makes the response of a solution in another way than as one node with `pullback`; None:
        no other way.
        """
        return None

    @abstractmethod
    def solve(self, system: LinearSystem, cotangent: Cotangent) -> Solve:
        """Returns q with Aᵀ q ≈ v.

        Args:
            system: the products with Aᵀ and Bᵀ at the solution, and the optimizer's step.
            cotangent: v, one tensor per parameter, None where it is zero for want of a reader.
        """

    def pullback(
        self, call: Pullback, cotangent: Cotangent
    ) -> tuple[list[Tensor | None], SolveReport]:
        """Returns the cotangents of the response's inputs, (dθ*/dx)ᵀ v = -Bᵀ A⁻ᵀ v, and the solve's
        report.
        """
        system = self.products.linearize(call, implicit=not self.differentiates_step)
        with torch.set_grad_enabled(call.differentiate):
            solve = self.solve(system, cotangent)
            if len(solve.q) != len(system.names) or any(
                q is not None and q.shape != t.shape
                for q, t in zip(solve.q, system.parameters, strict=True)
            ):
                raise EngineError(
                    f"Engine {self.name!r} returned a q that does not have one entry, of its "
                    f"shape, for each parameter of problem {system.problem!r}."
                )
            # Of the two sides of -Bᵀ q the result has the fewer entries, as a rule.
            return [
                None if entry is None else -entry for entry in system.mixed_vjp(solve.q)
            ], solve.report

    def report(
        self,
        problem: str,
        *,
        iterations: int = 0,
        residual: float | None = None,
        converged: bool = True,
        advice: str = "",
        curvature: float | None = None,
    ) -> SolveReport:
        """Makes this engine's report on a problem."""
        return SolveReport(
            problem=problem,
            engine=self.label,
            iterations=iterations,
            residual=residual,
            converged=converged,
            advice=advice,
            curvature=curvature,
        )


def relative_residual(
    system: LinearSystem, q: Sequence[Tensor], cotangent: Sequence[Tensor]
) -> float:
    """Returns ‖Aᵀq − v‖ / ‖v‖ (the plain norm of Aᵀq where v is zero)."""
    with torch.no_grad():
        product = system.transpose_product(q)
        error = total_norm([a - b for a, b in zip(product, cotangent, strict=True)])
        size = total_norm(cotangent)
    return float(error / size) if size > 0 else float(error)
