"""`penalty`: the response by first gradients only, from two tilted copies of the lower problem.

Let g be the lower loss, ȳ the current solution, and v the cotangent. Let y± minimise

    g(x, y) − ⟨∇_y g(x, ȳ), y⟩ ∓ ε ⟨v, y⟩,

the lower loss tilted by v. (The second term makes ȳ the untilted solution even if the lower problem
has not converged. So the derivative is taken at ȳ, as in every implicit engine.)

Then ∇_y g(x, y±) = ∇_y g(x, ȳ) ± ε v, so (y₊ − y₋) / 2ε = A⁻¹ v + O(ε²). The cotangent of the
inputs is

    −(∇_x g(x, y₊) − ∇_x g(x, y₋)) / 2ε = −Bᵀ A⁻¹ v + O(ε²).

By the envelope theorem, with λ = 1/ε, each side is the gradient of the penalty λ (g(x, y) − min g)
on the value function of the lower problem, with the upper loss linearised (F2SA). Both sides
together leave an error of second order. No second derivative is formed, so flash attention and
compiled modules can be used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mlo.gradient_norm import total_norm
from mlo.hypergradient.finite_difference import FiniteDifference
from mlo.hypergradient.iterative import FlatOperator
from mlo.hypergradient.options import count, number, number_or_auto
from mlo.hypergradient.step_size import persistent_step_size
from mlo.records import CONVERGED, SolveReport
from mlo.response import Cotangent, Pullback, PullbackEngine
from mlo.tensors import zeros_for_none

__all__ = ["Penalty"]

GROWTH = 10.0
"""A residual this many times the first one means that the copies diverge."""

ADVICE_DIVERGED = (
    "The tilted copies diverge: use step_size='auto' or a smaller one, or a larger multiplier."
)
ADVICE_SLOW = "The copies have hardly begun to separate: raise steps."


@dataclass(frozen=True, kw_only=True)
class Penalty(PullbackEngine):
    """Moves two copies of the lower problem, tilted by ± the cotangent, by gradient descent.

    An upper update takes 2 · steps + 3 gradient evaluations (two fewer from a cold start). On a
    quadratic loss K cold steps are the Neumann series with K terms.

    Attributes:
        steps: gradient steps of each copy, K.
        step_size: of these steps, below 2 / λmax. "auto" takes 1 / λmax, where λmax is estimated by
            finite differences and estimated again every hundred solves. It is raised whenever the
            copies show a larger curvature.
        multiplier: λ = 1/ε, the weight of the penalty. "auto" keeps ‖y₊ − y₋‖ at the
            finite-difference step that suits the dtype. A smaller one tilts further, with an error
            of O(1/λ²).
        warm_start: resume from the last displacement (y₊ − y₋) / 2ε, as F2SA does; otherwise both
            copies start at the solution.
        tol: residual above which the solve counts as failed. At the default half of the cotangent
            is left over. Up to it the copies are reported as truncated, and as converged if the
            residual is at most `mlo.records.CONVERGED`.

    Reference: Kwon et al., A Fully First-Order Method for Stochastic Bilevel Optimization (2023),
    Eq. 2 and Algorithm 1; Liu et al., BOME (2022); Zucchet and Sacramento, Beyond backpropagation
    (2022), for the centred estimate.
    """

    steps: int = count(5)
    step_size: float | str = number_or_auto()
    multiplier: float | str = number_or_auto()
    warm_start: bool = True
    tol: float = number(0.5)

    name: ClassVar[str] = "penalty"
    needs_symmetry: ClassVar[bool] = True

    @property
    def differentiable(self) -> bool:
        return False

    @property
    def uses_second_derivatives(self) -> bool:
        return False

    @torch.no_grad()
    def pullback(
        self, call: Pullback, cotangent: Cotangent
    ) -> tuple[list[Tensor | None], SolveReport]:
        system = FiniteDifference().linearize(call)
        theta = system.parameters
        v = zeros_for_none(cotangent, theta)
        size = float(total_norm(v))
        if size == 0.0:
            zeros = [torch.zeros_like(t) for t in call.select(call.inputs)]
            return call.scatter(zeros), self.report(system.problem, residual=0.0)
        operator = FlatOperator(system, 0.0)
        alpha = persistent_step_size(self.step_size, operator, system, observed=0.0)
        kept = system.recall("q") if self.warm_start else None
        q = [torch.zeros_like(t) for t in theta] if kept is None else operator.split(kept)

        # ε is chosen by how far apart the copies will be: in units of 2ε by q or, from a cold
        # start, by at most α K v.
        expected = [alpha * self.steps * entry for entry in v] if kept is None else q
        if isinstance(self.multiplier, str):
            e = float(system.step_size(expected))
        else:
            e = 1.0 / self.multiplier

        # `still` is ∇_y g(x, ȳ), the gradient at which the copies are at rest without a tilt.
        up, down = _displaced(theta, q, e), _displaced(theta, q, -e)
        still = system.gradient_at(theta)
        residual, first, curvature = math.inf, math.inf, 0.0
        for step in range(self.steps):
            at_rest = kept is None and step == 0
            g_up = still if at_rest else system.gradient_at(up)
            g_down = still if at_rest else system.gradient_at(down)
            # (g₊ − g₋) / 2ε ≈ A (y₊ − y₋) / 2ε, which is v at the solution. So ‖bend‖ / apart is
            # ‖A w‖ / ‖w‖ for a w: a lower bound of λmax.
            bend = _half_difference(g_up, g_down, e)
            residual = _norm([b - x for b, x in zip(bend, v, strict=True)]) / size
            apart = _norm(_half_difference(up, down, e))
            curvature = max(curvature, _norm(bend) / apart if apart > 0.0 else 0.0)
            first = residual if step == 0 else first
            if not residual <= GROWTH * max(first, 1.0):
                # The copies diverge: one step from rest replaces them.
                up, down = _displaced(theta, v, alpha * e), _displaced(theta, v, -alpha * e)
                break
            up = _descended(up, g_up, still, v, alpha=alpha, e=e)
            down = _descended(down, g_down, still, v, alpha=alpha, e=-e)

        # The next solve takes shorter steps if this one met a larger curvature.
        known = system.recall("curvature")
        if known is not None and math.isfinite(curvature) and curvature > float(known):
            system.keep("curvature", torch.tensor(curvature, dtype=torch.float64))
        diverged = not residual <= GROWTH * max(first, 1.0)
        enough = residual <= self.tol or self.steps == 1
        if self.warm_start:
            system.keep("q", operator.flatten(_half_difference(up, down, e)))

        # −Bᵀ A⁻¹ v: with the minus sign, so `down` comes first.
        pulled = _half_difference(system.input_gradient_at(down), system.input_gradient_at(up), e)
        if system.is_unchecked:
            system.check_assumptions(v, system.mixed_vjp(v), self.label)
        report = self.report(
            system.problem,
            iterations=self.steps,
            residual=residual,
            converged=residual <= CONVERGED and not diverged,
            advice=ADVICE_DIVERGED if diverged else "" if enough else ADVICE_SLOW,
        )
        return call.scatter(pulled), report


def _descended(
    copy: Sequence[Tensor],
    gradient: Sequence[Tensor],
    still: Sequence[Tensor],
    v: Sequence[Tensor],
    *,
    alpha: float,
    e: float,
) -> list[Tensor]:
    """One gradient step of a copy on the loss tilted by e v, relative to the current gradient."""
    # The gradient of the tilted loss is ∇g(y) − ∇g(ȳ) − e v.
    entries = zip(copy, gradient, still, v, strict=True)
    return [y - alpha * (g - g0 - e * x) for y, g, g0, x in entries]


def _displaced(theta: Sequence[Tensor], q: Sequence[Tensor], e: float) -> list[Tensor]:
    return [t + e * entry for t, entry in zip(theta, q, strict=True)]


def _half_difference(up: Sequence[Tensor], down: Sequence[Tensor], e: float) -> list[Tensor]:
    """(y₊ − y₋) / 2ε."""
    return [(a - b) / (2.0 * e) for a, b in zip(up, down, strict=True)]


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(total_norm(tensors))
