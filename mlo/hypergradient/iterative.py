"""What all iterative inverses share: flat vectors, damping, warm starts and the stopping rule."""

from __future__ import annotations

import math
import zlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from mlo.errors import warn_user
from mlo.hypergradient.free_variables import solve_on_free_variables
from mlo.hypergradient.options import number
from mlo.hypergradient.products import Engine, LinearSystem, Solve
from mlo.projected_step import ProjectedStep
from mlo.records import SolveReport
from mlo.response import Cotangent
from mlo.sharding import sharded_like, whole
from mlo.tensors import norm_of, zeros_for_none

__all__ = [
    "ADVICE_NOT_FINITE",
    "ADVICE_SINGULAR",
    "FlatOperator",
    "IterationResult",
    "IterativeEngine",
    "fixed_noise",
    "power_of_two",
]

ADVICE_NOT_FINITE = (
    "A product with the Jacobian is not finite: at this point the loss has an operation without a "
    "finite second derivative (sqrt or norm at 0), or numbers overflow."
)
ADVICE_SINGULAR = (
    "The Jacobian is singular, and the cotangent has a part that it does not reach: the solution "
    "is not a function of what it reads. Add weight decay to the problem, or damping."
)


class FlatOperator:
    """u ↦ (A + damping · I)ᵀ u on flat vectors, and its transpose, counting products.

    Args:
        system: products on lists of tensors.
        damping: added to the diagonal.
        adjoint: makes it u ↦ (A + damping · I) u.
    """

    def __init__(self, system: LinearSystem, damping: float, *, adjoint: bool = False) -> None:
        self._system = system
        self._damping = damping
        self._adjoint = adjoint
        self._shapes = [tensor.shape for tensor in system.parameters]
        self._sizes = [tensor.numel() for tensor in system.parameters]
        self.products = 0

    def __call__(self, u: Tensor) -> Tensor:
        return self._product(u, adjoint=self._adjoint)

    def transposed(self, u: Tensor) -> Tensor:
        """The product with the transposed operator: (A + damping · I) u."""
        return self._product(u, adjoint=not self._adjoint)

    def adjoint(self) -> FlatOperator:
        """The transposed operator, which counts its own products."""
        return FlatOperator(self._system, self._damping, adjoint=not self._adjoint)

    def _product(self, u: Tensor, *, adjoint: bool) -> Tensor:
        self.products += 1
        product = self._system.product if adjoint else self._system.transpose_product
        found = self.flatten(product(self.split(u)))
        return found + self._damping * u if self._damping else found

    def flatten(self, parts: Cotangent) -> Tensor:
        """One vector [n] from one tensor per parameter; None counts as zero."""
        return torch.cat(
            [whole(part).reshape(-1) for part in zeros_for_none(parts, self._system.parameters)]
        )

    def split(self, flat: Tensor) -> list[Tensor]:
        """The inverse of `flatten`."""
        # Of a sharded parameter the flat vector has all entries, and each process keeps its part.
        parts: Sequence[Tensor] = torch.split(flat, self._sizes)
        return [
            sharded_like(part.view(shape), parameter)
            for part, shape, parameter in zip(
                parts, self._shapes, self._system.parameters, strict=True
            )
        ]


@dataclass(frozen=True, kw_only=True)
class IterationResult:
    """The result of an iteration.

    Attributes:
        x: approximate solution of (A + damping · I)ᵀ x = b, flat [n].
        residual: ‖b − (A + damping · I)ᵀ x‖ relative to the cotangent's norm: of the damped system.
        curvature: smallest uᵀAu / uᵀu met, or None.
    """

    x: Tensor
    residual: float
    converged: bool
    advice: str = ""
    curvature: float | None = None


@dataclass(frozen=True, kw_only=True)
class IterativeEngine(Engine):
    """Base of the engines that solve (A + damping · I)ᵀ q = v by products alone.

    If the response is differentiated twice, the equation is differentiated rather than the
    iteration (see `_solved`).

    Attributes:
        damping: added to the diagonal of A (which contains the optimizer's weight decay already).
        warm_start: start each solve from the solution of the last one on the same problem.
        is_polynomial: whether `iterate` applies one polynomial in Aᵀ, the same for every b, whose
            own derivative is right.
    """

    damping: float = number(0.0)
    warm_start: bool = False

    inverts: ClassVar[bool] = True
    is_polynomial: ClassVar[bool] = False

    @abstractmethod
    def iterate(
        self, operator: FlatOperator, b: Tensor, scale: float, system: LinearSystem
    ) -> IterationResult:
        """Solves operator(x) ≈ b from x = 0.

        The system comes divided by a power of two, so that the cotangent has a norm of about 1.

        Args:
            operator: the damped product with Aᵀ.
            b: right-hand side, flat [n].
            scale: norm of the cotangent, to which residuals are relative.
            system: the system behind the operator.
        """

    def operator(self, system: LinearSystem) -> FlatOperator:
        """The product that the iteration is made with."""
        return FlatOperator(system, self.damping)

    def solve(self, system: LinearSystem, cotangent: Cotangent) -> Solve:
        residual = system.call.residual
        if self.needs_symmetry and isinstance(residual, ProjectedStep):
            return solve_on_free_variables(system, cotangent, residual, self._solve, self.label)
        return self._solve(system, cotangent)

    def _solve(self, system: LinearSystem, cotangent: Cotangent) -> Solve:
        """Solves the system as it is."""
        operator = self.operator(system)
        v = operator.flatten(cotangent)
        scale = norm_of(v)
        if scale == 0.0:
            if not torch.is_grad_enabled():  # q = 0 is exact, and residuals have no scale
                return Solve(q=operator.split(v), report=self.report(system.problem, residual=0.0))
            scale = 1.0  # the derivative of q at v = 0 is A⁻ᵀ all the same
        if self.needs_symmetry:
            warn_of_asymmetry(system, self.label)
        start = system.recall("q") if self.warm_start else None
        if start is not None and start.shape == v.shape:
            # Aᵀ (q0 + d) = v: the correction d solves the same system, with the residual of the
            # last solution q0 on the right.
            outcome = self._solved(operator, v - operator(start), scale, system)
            q = start + outcome.x
        else:
            outcome = self._solved(operator, v, scale, system)
            q = outcome.x
        if self.warm_start:
            system.keep("q", q)
        report = self._report(system, outcome, operator.products)
        return Solve(q=operator.split(q), report=report)

    def _solved(
        self, operator: FlatOperator, b: Tensor, scale: float, system: LinearSystem
    ) -> IterationResult:
        """Solves operator(x) ≈ b, with the derivative of the solution of that equation.

        The derivative of a Krylov method differs from it. Its x = p(Aᵀ) b has a polynomial p that
        suits this b. If b has no component along an eigenvector, p is arbitrary there, and a change
        of A or b that introduces one would be multiplied by anything.
        """
        if self.is_polynomial or not torch.is_grad_enabled():
            return self._iterated(operator, b, scale, system)
        if bool((b == 0.0).all()):
            outcome = IterationResult(x=torch.zeros_like(b), residual=0.0, converged=True)
        else:
            with torch.no_grad():
                outcome = self._iterated(operator, b, scale, system)
        # r = b − Aᵀ x at a constant x has the derivative db − dAᵀ x, and dx = A⁻ᵀ dr.
        made = operator.products
        r = b - operator(outcome.x)
        operator.products = made
        # A is symmetric at this point, if an engine needs symmetry.
        backward = operator if self.needs_symmetry else operator.adjoint()
        correction = _Correction.apply(self, backward, system, r)
        return replace(outcome, x=outcome.x + correction)

    def _iterated(
        self, operator: FlatOperator, b: Tensor, scale: float, system: LinearSystem
    ) -> IterationResult:
        """`iterate`, on a cotangent of about unit norm."""
        # Squares of a very small or large cotangent would underflow or overflow. A power of two
        # divides without rounding.
        unit = power_of_two(scale)
        outcome = self.iterate(operator, b / unit, scale / unit, system)
        return replace(outcome, x=outcome.x * unit)

    def _report(self, system: LinearSystem, outcome: IterationResult, products: int) -> SolveReport:
        return self.report(
            system.problem,
            iterations=products,
            residual=outcome.residual,
            converged=outcome.converged,
            advice=outcome.advice,
            curvature=outcome.curvature,
        )


class _Correction(torch.autograd.Function):
    """Zero, with the derivative of A⁻ᵀ r: its backward pass is a solve with A."""

    @staticmethod
    def forward(
        ctx: Any, engine: IterativeEngine, operator: FlatOperator, system: LinearSystem, r: Tensor
    ) -> Tensor:
        ctx.engine, ctx.operator, ctx.system = engine, operator, system
        return torch.zeros_like(r)

    @staticmethod
    def backward(ctx: Any, p: Tensor) -> tuple[None, None, None, Tensor]:
        engine, operator, system = ctx.engine, ctx.operator, ctx.system
        scale = norm_of(p)
        if scale == 0.0 and not torch.is_grad_enabled():
            return None, None, None, torch.zeros_like(p)
        made = operator.products
        outcome = engine._solved(operator, p, scale or 1.0, system)
        system.call.reading.note(engine._report(system, outcome, operator.products - made))
        return None, None, None, outcome.x


def power_of_two(size: float) -> float:
    """The power of two next above a size; 1 for one that is zero or not finite."""
    return math.ldexp(1.0, math.frexp(size)[1]) if math.isfinite(size) else 1.0


POSITIVE = "; or, where its eigenvalues have positive real parts, {}"

ASYMMETRY = 1e-3
"""Relative asymmetry of A that causes a warning; rounding counts ten times the root of epsilon."""


def warn_of_asymmetry(system: LinearSystem, engine: str) -> None:
    """Warns, once per problem, of a Jacobian that an engine wrongly assumes to be symmetric.

    The Jacobian of a loss's gradient is symmetric. That of another residual F need not be: it is
    tested in two random directions, uᵀ A w = wᵀ A u.
    """
    call = system.call
    checks = call.solution.evaluation.loss.checks
    if call.residual is None or not checks.is_due("symmetry", once=True):
        return
    operator = FlatOperator(system, 0.0)
    u, w = fixed_noise(operator, system, 2).T
    au, aw = operator(u).detach(), operator(w).detach()
    # u has entries of size 1, so uᵀ (A w) is about ‖A w‖ large.
    difference, size = float((u @ aw - w @ au).abs()), float(au.norm() + aw.norm())
    if difference > max(ASYMMETRY, 10.0 * torch.finfo(u.dtype).eps ** 0.5) * size:
        warn_user(
            f"Problem {system.problem!r}: the Jacobian A of its condition is not symmetric, which "
            f"the engine {engine!r} needs (for two random directions uᵀAw and wᵀAu differ by "
            f"{difference / size:.1g} of their size)."
            f"{system.advice.phrase(' Use {}', 'gmres', 'direct')}"
            f"{system.advice.phrase(POSITIVE, 'neumann')}."
        )


def fixed_noise(operator: FlatOperator, system: LinearSystem, columns: int) -> Tensor:
    """A standard normal matrix [n, columns], the same at every call for parameters of one name.

    It does not depend on the cotangent, so that solves which use it stay linear in the cotangent.
    Nor does it depend on the order in which parameters are registered.
    """
    # Drawn on the CPU from a hash of the name, so that all devices and processes have the same.
    flat = []
    for column in range(columns):
        parts = []
        for name, tensor in zip(system.names, system.parameters, strict=True):
            generator = torch.Generator().manual_seed(zlib.crc32(f"{name}/{column}".encode()))
            parts.append(
                torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype).to(tensor.device)
            )
        flat.append(operator.flatten(parts))
    return torch.stack(flat, dim=1)
