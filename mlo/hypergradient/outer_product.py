"""`outer_product`: the Hessian replaced by the outer product of the gradient, A ≈ g gᵀ.

Let g = F(θ, x), and h = ∇_x L(θ, x). With A ≈ g gᵀ + damping · I and B ≈ g hᵀ, the cotangent of the
inputs is

    −Bᵀ A⁻¹ v = −(gᵀ v / (‖g‖² + damping)) h ,

by the Sherman-Morrison formula (for damping = 0 with the pseudoinverse of g gᵀ). It takes one
backward pass of the loss and no second derivative.

Its meaning: dθ = −g (hᵀ dx) / ‖g‖² is the shortest move of θ that keeps the lower loss at its value
while x moves. So it is a response along a level set, away from the solution. At the solution, where
g = 0, it is undefined, and near the solution it grows as 1/‖g‖.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mlo.backward import gradients
from mlo.gradient_norm import total_norm
from mlo.hypergradient.options import number
from mlo.optimizer_traits import l2_penalty
from mlo.records import SolveReport
from mlo.response import Cotangent, Pullback, PullbackEngine
from mlo.sharding import whole
from mlo.tensors import zeros_for_none

__all__ = ["OuterProduct"]

REACH = 1e3
"""A response that moves θ by this many times its size as x is doubled is meaningless."""

ADVICE = (
    "The lower gradient has vanished, and this engine's response grows as its inverse. Give it "
    "damping of the order of a usual ‖g‖²"
)
SOLVERS = "cg", "gmres", "neumann", "penalty"


@dataclass(frozen=True, kw_only=True)
class OuterProduct(PullbackEngine):
    """Replaces the Hessian by the outer product of the lower gradient, at the cost of one gradient.

    It suits a few steps far from the solution. At a solution the approximation is void, and its
    report says so.

    Attributes:
        damping: added to ‖g‖². Without it a zero gradient gives a zero response.

    Reference: Liu et al., Learning with Constraint Learning (2024), whose implicit gradient
    approximation BOAT calls IGA.
    """

    damping: float = number(0.0)

    name: ClassVar[str] = "outer_product"
    needs_symmetry: ClassVar[bool] = True  # and one loss per problem

    @property
    def differentiable(self) -> bool:
        return False

    @property
    def uses_second_derivatives(self) -> bool:
        return False

    def pullback(
        self, call: Pullback, cotangent: Cotangent
    ) -> tuple[list[Tensor | None], SolveReport]:
        with torch.enable_grad():
            theta, inputs = call.parameter_aliases(), call.input_aliases()
            of = call.select(inputs)
            with call.losses(theta, inputs) as losses:
                (value,) = losses.values()
                found = gradients(value, [*theta.values(), *of])
        own, h = found[: len(theta)], found[len(theta) :]
        # The optimizer converges to ∇L + decay · θ = 0.
        decay = l2_penalty(call.solution.evaluation.loss.problem)
        terms = zip(own, theta.items(), strict=True)
        g = [term + decay[name] * tensor.detach() for term, (name, tensor) in terms]

        size = float(total_norm(g))
        pairs = zip(zeros_for_none(cotangent, g), g, strict=True)
        along = sum(float(whole((v * entry).sum())) for v, entry in pairs)
        scale = size * size + self.damping
        factor = -along / scale if scale > 0.0 else 0.0
        # As x is doubled, θ moves by ‖h‖ ‖x‖ / ‖g‖.
        vanished = self.damping == 0.0 and not (
            float(total_norm(h)) * _size(of) <= REACH * size * _size(list(theta.values()))
        )
        advice = ""
        if vanished:
            others = call.solution.evaluation.loss.advice
            advice = ADVICE + others.phrase(", or use {}, for solved problems", *SOLVERS) + "."
        report = self.report(call.solution.name, converged=not vanished, advice=advice)
        return call.scatter([factor * entry for entry in h]), report


def _size(tensors: Sequence[Tensor]) -> float:
    """The norm of tensors; while they are still zero, that of entries of 0.01."""
    count = sum(tensor.numel() for tensor in tensors)
    return max(float(total_norm([t.detach() for t in tensors])), 0.01 * math.sqrt(count))
