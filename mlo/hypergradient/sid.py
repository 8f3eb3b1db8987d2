"""`sid`: a linear solve by stochastic steps, each on its own batch.

Let Â_j and B̂_j be A and B on batch j. From q_0 = 0 the steps are

    q_{j+1} = q_j + α_j (v − Â_jᵀ q_j) ,    α_j = α / (1 + decay · j) ,    j = 0 … K−1 ,

and the cotangent of the inputs is −(1/M) Σ_m B̂_mᵀ q_K, over M batches that no step has seen. If
the batches are independent, E[q_K] is the result of the same steps with the mean A: the mean of a
product of independent factors is the product of their means. And q_K is independent of B̂. So the
only bias of the estimate is the truncation after K steps, whereas E[Â⁻¹] ≠ A⁻¹. Its variance tends
to zero with a decay, and stays of the order of α without one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from mlo.hypergradient.iterative import FlatOperator
from mlo.hypergradient.options import count, number, number_or_auto
from mlo.hypergradient.products import Engine, LinearSystem, Solve
from mlo.hypergradient.step_size import persistent_step_size
from mlo.records import SolveReport
from mlo.response import Cotangent, Pullback
from mlo.tensors import add

__all__ = ["Sid"]

ADVICE = (
    "The steps diverge, or single batches say too little: use step_size='auto' or a smaller one, "
    "decay, larger batches in solve_data, or damping if A has negative eigenvalues."
)


@dataclass(frozen=True, kw_only=True)
class Sid(Engine):
    """Makes K steps of the linear solve, each on a fresh batch, with other batches for B.

    The batches are those of `Problem(solve_data=..., solve_batches=N)`. The last `mixed_batches` of
    them are for B, and the others are for the steps, in turn: with N = steps + mixed_batches each
    is used once. With N = 1 all products are on that batch, and the steps sum the Neumann series.
    Otherwise one batch's graph is held at a time.

    Attributes:
        steps: K.
        mixed_batches: M, the batches over which the mixed product is averaged.
        step_size: α, below 2 / λmax of every single batch. "auto" takes 1 / λmax of the first one,
            estimated by ten products and again every hundred solves. It is raised whenever a step
            shows a larger curvature.
        decay: of the step size, per step.
        damping: added to the diagonal of A.
        warm_start: start from the last solve's q, which is independent of the new batches.
        tol: relative residual, averaged over the second half of the steps, above which the solve
            counts as failed. By default only divergence does. Up to it the steps are reported as
            truncated, and as converged if the residual is at most `mlo.records.CONVERGED`.

    Reference: Grazzi, Pontil, Salzo, Convergence Properties of Stochastic Hypergradients (2021),
    Algorithm 1; with decaying steps and averaged B, Grazzi et al., Bilevel Optimization with a
    Lower-level Contraction (2023).
    """

    steps: int = count(10)
    mixed_batches: int = count(1)
    step_size: float | str = number_or_auto()
    decay: float = number(0.0)
    damping: float = number(0.0)
    warm_start: bool = False
    tol: float = number(1.0)

    name: ClassVar[str] = "sid"
    inverts: ClassVar[bool] = True

    def pullback(
        self, call: Pullback, cotangent: Cotangent
    ) -> tuple[list[Tensor | None], SolveReport]:
        batches = len(call.solution.evaluation.batches)
        if batches == 1:
            return super().pullback(call, cotangent)  # one system, linearized once
        for_steps = max(batches - self.mixed_batches, 1)
        with torch.set_grad_enabled(call.differentiate):
            iteration = _Iteration(self)
            for step in range(self.steps):
                with self._on_batch(call, step % for_steps) as system:
                    iteration.advance(system, cotangent)
            total: list[Tensor | None] = [None] * len(call.inputs)
            for index in range(for_steps, batches):
                with self._on_batch(call, index) as system:
                    q = iteration.solution(system)
                    found = system.mixed_vjp(q)
                    if system.assumes:
                        system.check_assumptions(q, found, self.label)
                total = list(map(add, total, found))
            mean = -1.0 / (batches - for_steps)
            pulled = [None if entry is None else mean * entry for entry in total]
            return pulled, iteration.report(call.solution.name)

    def solve(self, system: LinearSystem, cotangent: Cotangent) -> Solve:
        iteration = _Iteration(self)
        for _ in range(self.steps):
            iteration.advance(system, cotangent)
        return Solve(q=iteration.solution(system), report=iteration.report(system.problem))

    @contextmanager
    def _on_batch(self, call: Pullback, index: int) -> Iterator[LinearSystem]:
        """The products on one of the batches, whose graph is released at the end of the body."""
        evaluation = call.solution.evaluation
        on_batch = replace(
            evaluation,
            batches=evaluation.batches[index : index + 1],
            random_states=evaluation.random_states[index : index + 1],
            versions=evaluation.versions[index : index + 1],
        )
        with ExitStack() as stack:
            part = replace(call.solution, evaluation=on_batch, graph=None)
            yield self.products.linearize(replace(call, solution=part, stack=stack))


class _Iteration:
    """The steps of one solve.

    Args:
        engine: its options.
    """

    def __init__(self, engine: Sid) -> None:
        self._engine = engine
        self._q: Tensor | None = None  # flat, [n]
        self._made = 0
        self._alpha = self._scale = self._curvature = 0.0
        self._residuals: list[Tensor] = []  # v − Â_jᵀ q_j of the second half of the steps

    def advance(self, system: LinearSystem, cotangent: Cotangent) -> None:
        """Makes the next step, with the products of its batch."""
        engine, operator = self._engine, FlatOperator(system, self._engine.damping)
        v = operator.flatten(cotangent)
        if self._q is None:
            self._alpha = persistent_step_size(engine.step_size, operator, system, observed=0.0)
            self._scale = float(v.detach().norm())
            kept = system.recall("q") if engine.warm_start else None
            self._q = torch.zeros_like(v) if kept is None else kept
        length = float(self._q.detach().norm())
        product = operator(self._q) if length > 0.0 else torch.zeros_like(v)
        if length > 0.0:
            self._curvature = max(self._curvature, float(product.detach().norm()) / length)
        residual = v - product
        if 2 * self._made + 2 > engine.steps:
            self._residuals.append(residual.detach())
        self._q = self._q + self._alpha / (1.0 + engine.decay * self._made) * residual
        self._made += 1

    def solution(self, system: LinearSystem) -> list[Tensor]:
        """q, one tensor per parameter; keeps what the next solve needs."""
        assert self._q is not None
        if self._engine.warm_start:
            system.keep("q", self._q)
        known = system.recall("curvature")
        if known is not None and float(known) < self._curvature < math.inf:
            system.keep("curvature", torch.tensor(self._curvature, dtype=torch.float64))
        return FlatOperator(system, 0.0).split(self._q)

    def report(self, problem: str) -> SolveReport:
        """The report on the steps."""
        residual = float(torch.stack(self._residuals).mean(0).norm()) / (self._scale or 1.0)
        return self._engine.report(
            problem,
            iterations=self._made,
            residual=residual,
            advice="" if residual <= self._engine.tol else ADVICE,
        )
