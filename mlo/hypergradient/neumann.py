"""`neumann`: the inverse by its truncated Neumann series, A⁻ᵀ v ≈ α Σ_{k < K} (I − α Aᵀ)ᵏ v."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from mlo.advice import EngineAdvice
from mlo.errors import EngineError
from mlo.hypergradient.iterative import (
    ADVICE_NOT_FINITE,
    FlatOperator,
    IterationResult,
    IterativeEngine,
)
from mlo.hypergradient.options import count, number, number_or_auto
from mlo.hypergradient.products import LinearSystem, Products
from mlo.hypergradient.step_size import largest_inverse_step_size
from mlo.records import CONVERGED
from mlo.solution import Stationary
from mlo.tensors import norm_of

__all__ = ["Neumann"]

GROWTH = 10.0
"""A term this many times larger than the first one means that the series diverges."""

ADVICE_SLOW = "The series has hardly begun to converge: raise num_terms"

HALVINGS = 3
"""How often "auto" halves a step size at which the series diverged."""


@dataclass(frozen=True, kw_only=True)
class Neumann(IterativeEngine):
    """K terms of the Neumann series, by K − 1 products with Aᵀ.

    It also works for games whose Jacobian has eigenvalues with positive real parts.

    Attributes:
        num_terms: K.
        tol: residual above which the solve counts as failed. At the default half of the cotangent
            is left over. Up to it the sum is reported as truncated, and as converged if its
            residual is at most `mlo.records.CONVERGED`.
        step_size: α, which must be below 2 / λmax for the series to converge. "auto" takes 1 /
            λmax, estimated by ten products of power iteration (for a game Re λ / |λ|² of the
            largest eigenvalue), and halves it if the series still diverges.
        fresh_batches: whether each factor I − α Aᵀ, and the mixed product, uses fresh batches of
            the problem's `solve_data`. The mean of such sums is the sum with the mean A, so a small
            batch does not bias it. `step_size` must then be a number.

    Reference: Lorraine et al., Optimizing Millions of Hyperparameters by Implicit Differentiation
    (2020), Theorem 3; with fresh batches Ji et al., Bilevel optimization: convergence analysis and
    enhanced design (2021), Algorithm 2 (StocBiO).
    """

    num_terms: int = count(10)
    step_size: float | str = number_or_auto()
    tol: float = number(0.5)
    fresh_batches: bool = False

    name: ClassVar[str] = "neumann"
    is_polynomial: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fresh_batches and (isinstance(self.step_size, str) or self.warm_start):
            raise EngineError(
                "Engine 'neumann': fresh_batches=True needs a number as step_size, since 'auto' "
                "would differ from batch to batch, and starts from zero (no warm_start)."
            )

    @property
    def fresh_products(self) -> int:
        return self.num_terms - 1 if self.fresh_batches else 0

    def operator(self, system: LinearSystem) -> FlatOperator:
        if self.fresh_batches:
            return _FreshOperator(system, self.damping, self.products)
        return super().operator(system)

    def iterate(
        self, operator: FlatOperator, b: Tensor, scale: float, system: LinearSystem
    ) -> IterationResult:
        if not isinstance(self.step_size, str):
            return self._sum(operator, b, scale, float(self.step_size), system.advice)
        largest = largest_inverse_step_size(operator, system)
        alpha = 1.0 / largest if largest > 0.0 else 1.0
        # Power iteration approaches λmax from below, so its 1 / λmax may be too long a step.
        for attempt in range(HALVINGS + 1):
            outcome = self._sum(operator, b, scale, alpha / 2**attempt, system.advice)
            if outcome.residual <= GROWTH * norm_of(b) / scale:
                break
        return outcome

    def _sum(
        self, operator: FlatOperator, b: Tensor, scale: float, alpha: float, others: EngineAdvice
    ) -> IterationResult:
        """The sum with one α."""
        # term = (I − αAᵀ)ᵏ b and total = Σ_{j ≤ k} (I − αAᵀ)ʲ b; x = α total.
        term = total = b
        first = size = norm_of(b)
        for _ in range(self.num_terms - 1):
            term = term - alpha * operator(term)
            size = norm_of(term)
            if not math.isfinite(size) or size > GROWTH * first:
                diverges = (
                    f"The series diverges at step_size {alpha:.3g}: use step_size='auto', or one "
                    "below 2 / λmax; on a Jacobian with negative eigenvalues, damping"
                    f"{others.phrase(', or {}', 'minres', 'gmres')}."
                )
                return IterationResult(
                    x=alpha * total,
                    residual=size / scale,
                    converged=False,
                    advice=ADVICE_NOT_FINITE if math.isnan(size) else diverges,
                )
            total = total + term
        # The residual of the sum is the term after the last: v − Aᵀ α Σ = (I − αAᵀ)ᴷ v. While the
        # terms shrink, the last one, which is available, bounds it.
        residual = size / scale
        # One term alone is a choice, and leaves the whole cotangent.
        enough = residual <= self.tol or self.num_terms == 1
        return IterationResult(
            x=alpha * total,
            residual=residual,
            converged=residual <= CONVERGED,
            advice="" if enough else f"{ADVICE_SLOW}{others.phrase(', or use {}', 'cg', 'gmres')}.",
        )


class _FreshOperator(FlatOperator):
    """The same product, each time on the solution's next batches.

    Args:
        system: at the solution.
        damping: added to the diagonal.
        products: how they are taken.
    """

    def __init__(self, system: LinearSystem, damping: float, products: Products) -> None:
        super().__init__(system, damping)
        self._call, self._products = system.call, products

    def __call__(self, u: Tensor) -> Tensor:
        solution = self._call.solution
        assert isinstance(solution, Stationary)  # of a step nothing is solved
        evaluation = solution.fresh[self.products]
        self.products += 1
        other = replace(solution, evaluation=evaluation, fresh=(), graph=None)
        with ExitStack() as stack:
            system = self._products.linearize(replace(self._call, solution=other, stack=stack))
            product = self.flatten(system.transpose_product(self.split(u)))
        return product + self._damping * u if self._damping else product
