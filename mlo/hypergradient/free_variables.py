"""Solves of projected problems on their free variables, for engines that need a symmetric A.

With `after_step` A = I − D (I − η H) (see `projected_step.py`; H with the decay). If P projects
onto a polyhedron, or shrinks by a threshold, D is the orthogonal projector onto the directions in
which the solution is free to move. Then Aᵀ q = v, that is (I − D) q + η H D q = v, separates:

    S z = D v   with   S = D H D + (I − D) = D Aᵀ η⁻¹ D + (I − D),
    y = η⁻¹ D z,   q = y + (I − D) (v − Aᵀ y).

S is symmetric, and positive definite if H is so on the free directions. The rates η are numbers,
one per parameter; D may mix parameters of one rate only. (A rate is negative if the optimizer
maximizes; |η| is then used, and S has −H, which is positive definite.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mlo.errors import EngineError
from mlo.gradient_norm import total_norm
from mlo.hypergradient.products import LinearSystem, Solve
from mlo.projected_step import ProjectedStep
from mlo.response import Cotangent
from mlo.tensors import zeros_for_none

__all__ = ["solve_on_free_variables"]

Direction = Sequence[Tensor]
Solver = Callable[[LinearSystem, Cotangent], Solve]


def solve_on_free_variables(
    system: LinearSystem, cotangent: Cotangent, residual: ProjectedStep, solve: Solver, engine: str
) -> Solve:
    """Finds q with Aᵀ q = v by a solve with the symmetric S.

    Args:
        system: the products with Aᵀ and Bᵀ.
        cotangent: v.
        residual: the condition F = 0.
        solve: solves a symmetric system.
        engine: label of the engine, for messages.

    Raises:
        EngineError: if D is not an orthogonal projector, as on the surface of a ball.
    """
    projector = _Projector(system, residual)
    projector.check(engine)
    v = zeros_for_none(cotangent, system.parameters)
    found = solve(_FreeSystem(system, projector), projector(v))
    y = projector.per_rate(projector(zeros_for_none(found.q, system.parameters)))
    rest = [a - b for a, b in zip(v, system.transpose_product(y), strict=True)]
    fixed = projector.complement(rest)
    return replace(found, q=[a + b for a, b in zip(y, fixed, strict=True)])


class _Projector:
    """u ↦ D u. D is piecewise constant, so no derivative flows through it."""

    def __init__(self, system: LinearSystem, residual: ProjectedStep) -> None:
        self._problem, self._names, self._advice = system.problem, system.names, system.advice
        call = system.call
        evaluation = call.solution.evaluation
        inputs = [tensor.detach() for tensor in call.input_aliases()]
        theta = {name: t.detach().requires_grad_() for name, t in evaluation.parameters.items()}
        with torch.enable_grad(), call.reads_at(theta, inputs) as reads:
            with residual.moved(evaluation, theta, reads) as moved:
                before = {name: u.detach().requires_grad_() for name, u in moved.items()}
            after = evaluation.after_step(before, reads)
        self._rates = [abs(residual.rates[name]) for name in self._names]
        self._before = [before[name] for name in self._names]
        self._after = [after[name] for name in self._names]

    def __call__(self, u: Direction) -> list[Tensor]:
        # The vjp, with the transpose of D, which is D.
        pairs = [
            (after, entry)
            for after, entry in zip(self._after, u, strict=True)
            if after.requires_grad
        ]
        if not pairs:
            return [torch.zeros_like(entry) for entry in u]
        outputs, entries = zip(*pairs, strict=True)
        # (D is a matrix of numbers: a function of u that autograd may differentiate is D u.)
        return list(_Linear.apply(self, outputs, *entries))

    def vjp(self, outputs: Direction, entries: Direction) -> tuple[Tensor, ...]:
        """Dᵀ u."""
        return torch.autograd.grad(
            outputs, self._before, entries, retain_graph=True, materialize_grads=True
        )

    def complement(self, u: Direction) -> list[Tensor]:
        """(I − D) u."""
        return [a - b for a, b in zip(u, self(u), strict=True)]

    def per_rate(self, u: Direction) -> list[Tensor]:
        """|η|⁻¹ u."""
        return [entry / rate for entry, rate in zip(u, self._rates, strict=True)]

    @torch.no_grad()
    def check(self, engine: str) -> None:
        """Refuses a D that is not an orthogonal projector, tried on two random directions.

        Raises:
            EngineError: with what to use.
        """
        noise = torch.Generator().manual_seed(0)
        u, w = (
            [torch.randn(t.shape, generator=noise).to(t) for t in self._before] for _ in range(2)
        )
        du, dw = self(u), self(w)
        size = float(total_norm(u)) * float(total_norm(w))
        rounding = 10.0 * torch.finfo(u[0].dtype).eps ** 0.5
        crossed = sum(float((a * b).sum()) for a, b in zip(u, dw, strict=True))
        back = sum(float((a * b).sum()) for a, b in zip(w, du, strict=True))
        twice = total_norm([a - b for a, b in zip(self(du), du, strict=True)])
        if abs(crossed - back) > rounding * size or float(twice) > rounding * float(total_norm(u)):
            raise EngineError(
                f"Problem {self._problem!r}: the engine {engine!r} needs a symmetric system. With "
                "after_step it solves on the free variables, which is exact if after_step "
                "projects onto a polyhedron (nonnegative, box, simplex) or is soft_threshold. "
                "The derivative of this after_step is not an orthogonal projector"
                f"{self._advice.phrase(': use {}', 'gmres', 'direct', 'neumann')}."
            )


class _Linear(torch.autograd.Function):
    """D u, whose derivative in u is D."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        projector: _Projector,
        outputs: Direction,
        *entries: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.projector, ctx.outputs = projector, outputs  # type: ignore[attr-defined]
        return projector.vjp(outputs, entries)

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *cotangents: Tensor
    ) -> tuple[Tensor | None, ...]:
        found = ctx.projector(cotangents)  # type: ignore[attr-defined]
        return (None, None, *found)


class _FreeSystem(LinearSystem):
    """The products with S in place of Aᵀ."""

    def __init__(self, system: LinearSystem, projector: _Projector) -> None:
        super().__init__(system.call)
        self._system, self._projector = system, projector

    @property
    def parameters(self) -> Direction:
        return self._system.parameters

    def gradient(self) -> Direction:
        return self._system.gradient()

    def mixed_vjp(self, u: Sequence[Tensor | None]) -> list[Tensor | None]:
        return self._system.mixed_vjp(u)

    def _hessian_vjp(self, u: Direction) -> list[Tensor]:
        free = self._projector.per_rate(self._projector(u))
        moved = self._projector(self._system.transpose_product(free))
        fixed = self._projector.complement(u)
        return [a + b for a, b in zip(moved, fixed, strict=True)]

    def _jacobian_product(self, u: Direction) -> list[Tensor]:
        return self._hessian_vjp(u)  # S is symmetric
